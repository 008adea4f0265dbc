"""How an app that emits events is tested: without a broker, and without knowing one."""
