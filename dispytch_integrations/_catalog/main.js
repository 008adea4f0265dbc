// What happens: the address, the keys, the search, the theme, paper.

const box = byId("search");
const content = byId("content");
const main = () => document.querySelector("main");
let by = "broker";
try {
  by = localStorage.getItem("dispytch-catalog-by") === "module" ? "module" : "broker";
} catch {
  // No storage: by broker.
}

function remember(name, value) {
  try {
    localStorage.setItem(`dispytch-catalog-${name}`, value);
  } catch {
    // Not remembered, then.
  }
}

const AT_ONCE = 40;

// -- the list ---------------------------------------------------------------------------------------------------------

function showList() {
  const text = box.value.trim();
  byId("switch").hidden = text !== "";
  if (text) {
    const { words, found } = search(text);
    const results = h("ul", {}, found.slice(0, AT_ONCE).map((hit) => eventLink(hit.event, words, hit)));
    byId("list").replaceChildren(found.length
      ? results
      : h("p", { class: "none" }, `Nothing has “${text}” in its name, type, fields, destination or description.`));
    byId("list").scrollTop = 0;
    if (found.length > AT_ONCE) {
      // What nobody sees yet comes once the first are painted.
      setTimeout(() => results.isConnected && results.append(...found.slice(AT_ONCE).map((hit) => eventLink(hit.event, words, hit))), 150);
    }
    byId("count").textContent = `${found.length} of ${plural(events.length, "event")}`;
  } else {
    byId("list").replaceChildren(...(events.length ? grouped(events, by).map((each) => group(each, by)) : [h("p", { class: "none" }, "No events yet.")]));
    byId("count").textContent = plural(events.length, "event");
  }
  showCurrent();
  if (!text) byId("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

const links = () => [...byId("list").querySelectorAll("a.event")].filter((link) => link.offsetParent);

function showCurrent() {
  const here = current() ? linkTo(current()) : null;
  for (const link of byId("list").querySelectorAll("a.event")) {
    if (link.getAttribute("href") === here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function showSwitch() {
  byId("switch").replaceChildren(...["broker", "module"].map((name) => h("button", {
    type: "button", "aria-pressed": String(by === name),
    onclick: () => {
      by = name;
      remember("by", name);
      byId("switch").querySelectorAll("button").forEach((each, at) => each.setAttribute("aria-pressed", String((at === 0) === (by === "broker"))));
      showList();
    },
  }, name === "broker" ? "Broker" : "Module")));
}

// -- the address ------------------------------------------------------------------------------------------------------

function fragment() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return location.hash.slice(1);
  }
}

const current = () => byAnchor.get(fragment()) ?? null;

function show({ focus = true } = {}) {
  const name = fragment();
  const event = current();
  if (event) main().replaceChildren(eventPage(event));
  else if (name) {
    main().replaceChildren(h("article", { class: "page" }, h("h1", { id: "name", tabindex: "-1" }, "No such event"),
      h("p", { class: "prose" }, `There is no event “${name}” here. It may have been renamed. `, h("a", { href: "#" }, "All events"))));
  } else main().replaceChildren(overview());
  document.title = event ? `${event.name} · ${doc.info?.title ?? "Events"}` : doc.info?.title ?? "Events";
  showView();
  showCurrent();
  if (focus) {
    scrollTo(0, 0);
    byId("name")?.focus({ preventScroll: true });
  }
  byId("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

/** On a phone one thing is seen at a time. */
function showView() {
  document.body.dataset.view = searching ? "search" : fragment() ? "event" : "home";
}

let searching = false;

addEventListener("hashchange", () => {
  searching = false;
  show();
});

// -- keys -------------------------------------------------------------------------------------------------------------

box.addEventListener("input", () => {
  searching = box.value.trim() !== "";
  showList();
  showView();
});
box.addEventListener("focus", () => {
  searching = box.value.trim() !== "";
  showView();
});

function clear() {
  box.value = "";
  searching = false;
  showList();
  showView();
  box.focus();
}

function open(link) {
  if (link.getAttribute("href") === location.hash) {
    searching = false;
    show();
  } else link.click();
}

addEventListener("keydown", (pressed) => {
  if (pressed.defaultPrevented || pressed.ctrlKey || pressed.metaKey || pressed.altKey) return;
  const target = pressed.target;
  const typing = target.matches?.("input, textarea, select, [contenteditable]");
  const inList = target.matches?.("#list a.event");
  const walk = (to) => {
    to?.focus();
    pressed.preventDefault();
  };
  if (pressed.key === "/" && !typing) {
    box.focus();
    box.select();
    pressed.preventDefault();
  } else if (pressed.key === "Escape" && (target === box || inList)) {
    clear();
    pressed.preventDefault();
  } else if (target === box && pressed.key === "ArrowDown") walk(links()[0]);
  else if (target === box && pressed.key === "Enter") {
    const first = box.value.trim() && links()[0];
    if (first) open(first);
  } else if (inList && ["ArrowDown", "ArrowUp", "Home", "End"].includes(pressed.key)) {
    const all = links();
    const at = all.indexOf(target);
    if (pressed.key === "ArrowUp" && at === 0) walk(box);
    else walk({ ArrowDown: all[at + 1], ArrowUp: all[at - 1], Home: all[0], End: all.at(-1) }[pressed.key]);
  }
});

// A link to what is shown already changes no address.
byId("list").addEventListener("click", (clicked) => {
  const link = clicked.target.closest("a.event");
  if (link && link.getAttribute("href") === location.hash) {
    searching = false;
    show();
  }
});

byId("skip").addEventListener("click", (clicked) => {
  clicked.preventDefault();
  content.focus();
});
byId("home").addEventListener("click", (clicked) => {
  clicked.preventDefault();
  if (box.value) clear();
  if (location.hash) location.hash = "";
  else show();
});

// -- the theme, the document ------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

function showTools() {
  const theme = h("button", { type: "button", class: "tool", id: "theme" });
  const draw = () => {
    const words = isDark() ? "Light theme" : "Dark theme";
    theme.setAttribute("aria-label", words);
    theme.title = words;
    theme.replaceChildren(icon(isDark() ? "sun" : "moon"));
  };
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    remember("theme", document.documentElement.dataset.theme);
    draw();
  });
  dark.addEventListener("change", draw);
  draw();
  byId("tools").replaceChildren(...downloads(), theme);
}

function downloads() {
  const link = (format, attributes) => h("a", { class: "tool", title: `The AsyncAPI document as ${format}`, "aria-label": `AsyncAPI document as ${format}`, ...attributes }, icon("down"), h("span", {}, format));
  if (document.body.dataset.served === "true") {
    const below = `${location.pathname.replace(/\/$/, "")}/`;
    return [link("JSON", { href: `${below}asyncapi.json` }), link("YAML", { href: `${below}asyncapi.yaml` })];
  }
  const file = link("JSON", { href: "#", download: "asyncapi.json" });
  file.addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([`${JSON.stringify(doc, null, 2)}\n`], { type: "application/json" }));
    file.href = url;
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
  return [file];
}

// -- paper: from the overview all events, else the one that is shown ---------------------------------------------------

addEventListener("beforeprint", () => {
  if (fragment()) return;
  document.documentElement.classList.add("printing");
  byId("print").replaceChildren(overview(), ...events.map((event) => eventPage(event, { paper: true })));
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  byId("print").replaceChildren();
});

showTools();
showSwitch();
showList();
show({ focus: false });
setTimeout(indexed);  // Before the first key.
