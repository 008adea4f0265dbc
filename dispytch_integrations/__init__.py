from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.events import EventBase, event_id
