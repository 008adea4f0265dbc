// What is seen: the list, one event, the overview. Text becomes text nodes alone, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function h(tag, attributes = {}, ...inner) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...inner.flat(9).filter((each) => each !== null && each !== undefined && each !== false));
  return element;
}

function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(SVG, "use"));
  svg.firstChild.setAttribute("href", `#i-${name}`);
  return svg;
}

const byId = (id) => document.getElementById(id);
const linkTo = (event) => `#${encodeURIComponent(event.anchor)}`;

function say(text) {
  byId("said").textContent = text;
}

// -- copying ----------------------------------------------------------------------------------------------------------

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No permission, or a page from a file: the older way, which a click allows.
  }
  const area = h("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  document.body.append(area);
  const before = document.activeElement;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return done;
}

/** `what`: for screen readers, as in "Copy the example". */
function copyButton(what, text, words = null) {
  const button = h("button", { type: "button", class: words ? "copy" : "copy small", "aria-label": `Copy ${what}`, title: `Copy ${what}` }, icon("copy"), words);
  button.addEventListener("click", async () => {
    const done = await copied(text());
    say(done ? `Copied ${what}` : "The browser does not let this page copy; select the text and press Ctrl+C");
    button.classList.toggle("done", done);
    button.replaceChildren(icon(done ? "done" : "copy"), words ? (done ? "Copied" : "Press Ctrl+C") : "");
    setTimeout(() => {
      button.classList.remove("done");
      button.replaceChildren(icon("copy"), words ?? "");
    }, 1800);
  });
  return button;
}

// -- text -------------------------------------------------------------------------------------------------------------

const escapedWords = (words) => words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).sort((a, b) => b.length - a.length);

function marked(text, words) {
  if (!words.length) return [text];
  return text.split(new RegExp(`(${escapedWords(words).join("|")})`, "gi")).map((part, at) => (at % 2 ? h("mark", {}, part) : part));
}

/** The `{field}` parts of an address stand out. */
const templated = (text) => text.split(/(\{[^{}]*\})/).map((part, at) => (at % 2 ? h("i", {}, part) : part));

const inline = (text) => text.split(/(`+[^`]+`+)/).map((part, at) => (at % 2 ? h("code", {}, part.replace(/^`+|`+$/g, "")) : part));

/** A docstring: paragraphs, lists, code. */
function prose(text) {
  const blocks = text.trim().split(/\n\s*\n/).filter(Boolean).map((block) => {
    const lines = block.split("\n");
    if (lines.every((line) => /^ {4}/.test(line))) return h("pre", {}, h("code", {}, block.replace(/^ {4}/gm, "")));
    if (/^\s*[-*] /.test(lines[0])) {
      return h("ul", {}, block.split(/^\s*[-*] /m).slice(1).map((item) => h("li", {}, inline(item.replace(/\s+/g, " ")))));
    }
    return h("p", {}, inline(block.replace(/\s+/g, " ")));
  });
  return blocks.length ? h("div", { class: "prose" }, blocks) : null;
}

// -- the list ---------------------------------------------------------------------------------------------------------

function eventLink(event, words = [], hit = null) {
  let below = h("small", {}, marked(event.address, words));
  if (hit?.field) below = h("small", { class: "said" }, "field ", h("code", {}, marked(hit.field, words)));
  if (hit?.about) {
    const text = event.about.replace(/\s+/g, " ");
    const from = Math.max(text.toLowerCase().indexOf(words[0]) - 30, 0);
    below = h("small", { class: "said" }, from ? "…" : "", marked(text.slice(from, from + 90), words));
  }
  return h("li", {}, h("a", { class: event.deprecated ? "event old" : "event", href: linkTo(event), title: event.address }, h("b", {}, marked(event.name, words)), below));
}

const closed = new Set();

function group([name, some], by) {
  const key = `${by} ${name}`;
  const items = h("ul", { hidden: closed.has(key) }, some.map((event) => eventLink(event)));
  const button = h("button", { type: "button", "aria-expanded": String(!closed.has(key)) }, icon("open"), h("span", {}, name.split("\0")[0]),
    by === "broker" && h("span", { class: "chip", "data-kind": some[0].kind }, some[0].transport),
    h("span", { class: "count" }, h("span", { class: "unseen" }, "events: "), String(some.length)));
  button.addEventListener("click", () => {
    closed[items.hidden ? "delete" : "add"](key);
    items.hidden = !items.hidden;
    button.setAttribute("aria-expanded", String(!items.hidden));
  });
  return h("section", { class: "group" }, h("h2", {}, button), items);
}

// -- the schema as a table --------------------------------------------------------------------------------------------

/** One field, and below it, once it is opened, what is inside: a schema that holds itself is opened as far as one likes. */
function fieldRows(row, depth, above, open) {
  if (row.case !== undefined) {
    return [h("tr", { class: "case", "data-depth": Math.min(depth, 5) }, h("td", { colspan: 3 }, h("span", {}, "as ", h("b", {}, row.case))))];
  }
  const { schema: found, nullable } = shape(row.schema);
  const inner = children(row.schema);
  const cell = h("td");
  const tr = h("tr", { class: depth ? "inner" : null, "data-depth": Math.min(depth, 5) }, cell, typeCell(row.schema, nullable), textCell(row.schema, found));
  const name = h("div", { class: "field" });
  if (inner.length) name.append(toggle(tr, row.name, () => inner.flatMap((each) => fieldRows(each, depth + 1, [...above, inner], false)), open));
  name.append(h("span", {}, row.name));
  cell.append(name, needs(row, found, nullable));
  return [tr, ...(inner.length && open ? tr.openNow() : [])];
}

function toggle(tr, name, make, open) {
  const button = h("button", { type: "button", class: "toggle", "aria-expanded": String(open), "aria-label": `Fields of ${name}` }, icon("open"));
  let rows = null;
  tr.openNow = () => (rows = make());
  tr.closeNow = () => {
    for (const each of rows ?? []) {
      each.closeNow?.();
      each.remove();
    }
    rows = null;
    button.setAttribute("aria-expanded", "false");
  };
  button.addEventListener("click", () => {
    if (rows) {
      tr.closeNow();
      return;
    }
    tr.after(...tr.openNow());
    button.setAttribute("aria-expanded", "true");
  });
  return button;
}

function needs(row, found, nullable) {
  const words = [row.required ? "always there" : "may be absent", nullable && "may be null"].filter(Boolean).join(", ");
  return h("span", { class: "needs" }, found.deprecated && h("span", { class: "chip warn" }, "deprecated"), found.deprecated && " ", words);
}

function typeCell(schema, nullable) {
  return h("td", {}, h("span", { class: "kindof" }, label(schema), nullable && h("em", {}, " | null")));
}

function textCell(schema, found) {
  const lines = [];
  if (found.description) lines.push(h("div", {}, inline(found.description.replace(/\s+/g, " ").trim())));
  const facts = rules(schema).map(([words, code]) => h("li", {}, words, code !== undefined && [" ", h("code", {}, code)]));
  const values = choices(schema);
  if (values.length) facts.unshift(h("li", {}, "one of ", values.flatMap((value, at) => [at ? ", " : "", h("code", {}, written(value))])));
  if (facts.length) lines.push(h("ul", { class: "rules" }, facts));
  return h("td", {}, lines.length ? lines : h("span", { class: "empty", "aria-label": "no description" }, "–"));
}

function schemaTable(rows, { openAll = false, caption }) {
  return h("table", { class: "schema" }, h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Field"), h("th", { scope: "col" }, "Type"), h("th", { scope: "col" }, "Meaning"))),
    h("tbody", {}, rows.flatMap((row) => fieldRows(row, 0, [], openAll))));
}

function fieldsPanel(event, openAll) {
  const payload = event.message.payload ?? {};
  const rows = children(payload);
  const body = shape(payload).schema;
  const panel = h("section", { class: "panel", "aria-label": "Fields" }, h("h2", {}, "Fields", rows.length > 0 && h("small", {}, plural(rows.length, "field"))));
  if (event.message["x-dispytch-tombstone"]) {
    panel.append(h("p", { class: "prose" }, "The body is null: in a compacted topic it deletes what was sent with the key."));
  } else if (rows.length) {
    panel.append(schemaTable(rows, { openAll, caption: `Fields of ${event.name}` }));
  } else if (event.message["x-dispytch-no-schema"]) {
    panel.append(h("p", { class: "prose" }, `There is no schema: ${event.message["x-dispytch-no-schema"]}`));
  } else if (body.properties || !Object.keys(body).length) {
    panel.append(h("p", { class: "prose" }, "No fields: that it happened is all it says."));
  } else {
    panel.append(schemaTable([{ name: "(the body)", schema: payload, required: true }], { openAll, caption: `Body of ${event.name}` }));
  }
  return panel;
}

// -- code -------------------------------------------------------------------------------------------------------------

const codeBlock = (what, text, colour) =>
  h("div", { class: "code" }, copyButton(what, () => text, "Copy"), h("pre", { tabindex: "0", "aria-label": what }, h("code", {}, colour(text))));

function examplePart(event) {
  if (!event.examples.length) {
    const why = event.message["x-dispytch-no-example"];
    return h("p", { class: "hint" }, why ? `No example: ${why}` : "No example. Give one: ", !why && h("code", {}, 'model_config = ConfigDict(json_schema_extra={"examples": [{...}]})'));
  }
  const show = (at) => codeBlock("the example", JSON.stringify(event.examples[at].payload, null, 2), colouredJSON);
  const holder = h("div", {}, show(0));
  if (event.examples.length === 1) return holder;
  const buttons = event.examples.map((example, at) => h("button", {
    type: "button", "aria-pressed": String(at === 0),
    onclick: () => {
      buttons.forEach((each, place) => each.setAttribute("aria-pressed", String(place === at)));
      holder.replaceChildren(show(at));
    },
  }, example.name ?? example.summary ?? `Example ${at + 1}`));
  return h("div", {}, h("div", { class: "choose", role: "group", "aria-label": "Examples" }, buttons), holder);
}

function codeParts(event) {
  const parts = [["Example", () => examplePart(event)]];
  const emit = emitSnippet(event);
  if (emit) {
    parts.push(["Emit", () => [codeBlock("the Python code that emits it", emit, colouredPython),
      h("p", { class: "hint" }, "pydantic turns text into the fields' types. In synchronous code it is ", h("code", {}, "emitter.emit(...)"), " without await.")]]);
  }
  const consume = consumeSnippet(event);
  if (consume) parts.push(["Consume", () => codeBlock("the Python code that consumes it", consume, colouredPython)]);
  parts.push(["Schema", () => codeBlock("the JSON schema", JSON.stringify(bundled(event.message.payload ?? {}), null, 2), colouredJSON)]);
  return parts;
}

let chosenTab = "Example";

function codePanel(event) {
  const parts = codeParts(event);
  const start = Math.max(parts.findIndex(([name]) => name === chosenTab), 0);
  const body = h("div", { role: "tabpanel", id: "code", "aria-labelledby": "tab-0" });
  const tabs = parts.map(([name], at) => h("button", { type: "button", role: "tab", id: `tab-${at}`, "aria-controls": "code", onclick: () => choose(at) }, name));
  const choose = (at) => {
    tabs.forEach((tab, place) => {
      tab.setAttribute("aria-selected", String(place === at));
      tab.tabIndex = place === at ? 0 : -1;
    });
    body.setAttribute("aria-labelledby", `tab-${at}`);
    body.replaceChildren(...[parts[at][1]()].flat());
    chosenTab = parts[at][0];
  };
  const row = h("div", { class: "tabs", role: "tablist", "aria-label": "Code" }, tabs);
  row.addEventListener("keydown", (pressed) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[pressed.key];
    if (!step) return;
    const next = (tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length;
    choose(next);
    tabs[next].focus();
    pressed.preventDefault();
  });
  const before = chosenTab;
  choose(start);
  chosenTab = before;
  return h("section", { class: "panel", "aria-label": "Code" }, row, body);
}

// -- where it goes ----------------------------------------------------------------------------------------------------

function wayFacts(event) {
  const { channel, kind, message, exchange } = event;
  const facts = [];
  const code = (text) => [h("span", {}, templated(text)), copyButton(text, () => text)];
  if (event.broker) facts.push(["Broker", [event.broker], "words"]);
  if (event.server?.host) facts.push(["Server", [list(event.server["x-hosts"]).join(", ") || event.server.host]]);
  if (exchange?.name) {
    facts.push([exchange.type && exchange.type !== "default" ? `Exchange, ${exchange.type}` : "Exchange", code(exchange.name)]);
    if (channel.address) facts.push(["Routing key", code(asWritten(channel.address, channel.parameters))]);
  } else if (event.address) facts.push([placeWord(event), code(event.address)]);
  if (event.ordering) facts.push([kind === "kafka" ? "Key, in order" : "In order per", [h("span", {}, templated(event.ordering))]]);
  const contentType = message.contentType ?? doc.defaultContentType;
  if (contentType) facts.push(["Body", [contentType]]);
  return facts;
}

const PLACES = { topic: "Topic", queue: "Queue", exchange: "Exchange", stream: "Stream", pubsub: "Pub/sub channel" };
const placeWord = (event) => PLACES[event.channel["x-dispytch-kind"]] ?? "Destination";

function parametersPanel(event) {
  const found = [...entries(event.channel["x-dispytch-exchange-parameters"]), ...entries(event.channel.parameters)];
  const rows = [...new Map(found)].map(([name, each]) => {
    const parameter = follow(each);
    return h("tr", {}, h("td", {}, h("div", { class: "field" }, h("span", { class: "part" }, parameter["x-dispytch-part"] ?? `{${name}}`))),
      h("td", {}, h("span", { class: "kindof" }, parameter.location ? "in the body" : "not in the body")), textCell(parameter, parameter));
  });
  if (!rows.length) return null;
  return h("section", { class: "panel", "aria-label": "Parameters" }, h("h2", {}, "Parts of the address", h("small", {}, "filled from the event's fields")),
    h("table", { class: "schema" }, h("caption", { class: "unseen" }, "Parts of the address"), h("thead", {}, h("tr", {}, ["Part", "Field", "Meaning"].map((word) => h("th", { scope: "col" }, word)))), h("tbody", {}, rows)));
}

function headersPanel(event, open) {
  const sent = follow(event.examples[0]).headers ?? {};
  const rows = children(event.message.headers ?? {}).map((row) => (Object.hasOwn(sent, row.name) ? { ...row, schema: { examples: [sent[row.name]], ...row.schema } } : row));
  if (!rows.length) return null;
  return h("details", { class: "panel", open }, h("summary", {}, icon("open"), "Headers", h("small", {}, plural(rows.length, "header"))),
    schemaTable(rows, { caption: `Headers of ${event.name}` }));
}

function othersPanel(event) {
  const same = events.filter((each) => each !== event && each.broker === event.broker && each.address === event.address);
  if (!same.length || !event.address) return null;
  const place = event.kind === "amqp" ? "exchange and key" : placeWord(event).toLowerCase();
  return h("section", { class: "panel", "aria-label": "Other events of the same place" },
    h("h2", {}, `Also on this ${place}`, h("small", {}, String(same.length))),
    h("ul", { class: "others" }, same.slice(0, 30).map((each) => eventLink(each))));
}

const note = (style, text) => (text ? h("p", { class: `note ${style}` }, text) : null);

function eventPage(event, { paper = false } = {}) {
  const { message } = event;
  const told = [
    event.broker && h("span", { class: "chip", "data-kind": event.kind }, event.transport),
    event.module && h("span", {}, event.module),
    event.deprecated && h("span", { class: "chip bad" }, "deprecated"),
    message["x-dispytch-tombstone"] && h("span", { class: "chip warn" }, "tombstone"),
  ];
  const facts = h("dl", { class: "panel way" }, wayFacts(event).map(([word, value, style]) => h("div", {}, h("dt", {}, word), h("dd", { class: style }, value))));
  const left = h("div", {}, fieldsPanel(event, paper), parametersPanel(event), headersPanel(event, paper), paper ? null : othersPanel(event));
  return h("article", { class: "page", "aria-labelledby": paper ? null : "name" },
    paper ? null : h("a", { class: "back", href: "#" }, icon("back"), "All events"),
    h("div", { class: "over" }, told),
    h("h1", paper ? {} : { id: "name", tabindex: "-1" }, event.name),
    h("p", { class: "type" }, h("span", {}, event.type), copyButton("the event's type", () => event.type)),
    note("bad", typeof message["x-dispytch-deprecated"] === "string" && `Deprecated: ${message["x-dispytch-deprecated"]}`),
    note("warn", message["x-dispytch-problem"]),
    prose(event.about),
    facts,
    h("div", { class: "both" }, left, h("div", { class: "codes" }, paper ? examplePart(event) : codePanel(event))));
}

// -- the overview -----------------------------------------------------------------------------------------------------

const START = `from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute
from pydantic import Field


class OrderPlaced(EventBase):
    """A customer has paid for an order."""

    __route__ = KafkaEventRoute(topic="orders")
    __event_type__ = "shop.order.placed"
    __ordering_key__ = "{order_id}"

    order_id: int = Field(description="Number on the invoice.", examples=[1001])`;

function overview() {
  const places = new Map();
  for (const event of events) {
    const key = `${event.broker}\0${event.address}`;
    places.set(key, [...(places.get(key) ?? []), event]);
  }
  const brokers = new Set(events.map((event) => event.broker));
  const page = h("article", { class: "page" }, h("h1", { id: "name", tabindex: "-1" }, doc.info?.title ?? "Events"));
  if (!events.length) {
    page.append(h("p", { class: "prose" }, "There is no event class here yet. Write one, or name the module that has them: the catalogue shows the classes that are imported."),
      h("section", { class: "panel start", "aria-label": "What to write" }, h("b", {}, "shop/events.py"), h("pre", { tabindex: "0" }, h("code", {}, colouredPython(START))),
        h("p", { class: "facts" }, h("span", {}, "Then ", h("code", {}, 'events="shop.events"'), " where the catalogue is made, or ", h("code", {}, "dispytch-integrations catalog shop.events"), "."))));
    return page;
  }
  page.append(h("p", { class: "facts" }, [[events.length, "event"], [places.size, "destination"], [brokers.size, "broker"]].map(([number, word]) =>
    h("span", {}, h("b", {}, String(number)), ` ${word}${number === 1 ? "" : "s"}`)), doc.info?.version && h("span", { class: "version" }, `version ${doc.info.version}`)));
  const about = doc.info?.description && prose(doc.info.description);
  if (about) page.append(about);
  page.append(serverCards(), placesTable(places), h("p", { class: "foot" }, h("kbd", {}, "/"), " searches, ", h("kbd", {}, "↓"), " walks the results, ", h("kbd", {}, "Esc"), ` clears. AsyncAPI ${doc.asyncapi ?? ""}.`));
  return page;
}

const transportOf = (server) => kindOf(server["x-dispytch-transport"] ?? server.protocol);

function serverCards() {
  const cards = entries(doc.servers).map(([name, each]) => {
    const server = follow(each);
    return h("li", { class: "panel" }, h("b", {}, name, h("span", { class: "chip", "data-kind": transportOf(server) }, KINDS[transportOf(server)] ?? server.protocol)),
      h("code", {}, `${list(server["x-hosts"]).join(", ") || server.host || ""}${server.pathname ?? ""}`), server.description && h("p", {}, server.description));
  });
  return cards.length ? h("ul", { class: "servers", "aria-label": "Brokers" }, cards) : "";
}

function placesTable(places) {
  const rows = [...places.values()].map((some) => h("tr", {},
    h("td", {}, templated(some[0].address)),
    h("td", {}, h("ul", {}, some.map((event) => h("li", {}, h("a", { href: linkTo(event) }, event.name)))))));
  return h("section", { class: "panel channels", "aria-label": "Destinations" }, h("h2", {}, "Where events go"),
    h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Destination"), h("th", { scope: "col" }, "Events"))), h("tbody", {}, rows)));
}
