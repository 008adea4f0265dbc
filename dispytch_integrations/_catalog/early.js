// Before the first paint: the theme that was chosen here, else the system's.
try {
  const chosen = localStorage.getItem("dispytch-catalog-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A page from a file may have no storage.
}
document.documentElement.classList.add("scripted");
