// The AsyncAPI document as the page shows it: the events, where they go, what is in them, and the search over all that.

// Numbers keep the digits they were written with: 1.0 is not 1, and 64 bits are more than JavaScript's numbers hold.
const exact = (key, value, context) =>
  typeof value === "number" && JSON.rawJSON && context?.source !== undefined && String(value) !== context.source
    ? JSON.rawJSON(context.source) : value;
const doc = JSON.parse(document.getElementById("document").textContent, exact);
const isRaw = (value) => Boolean(JSON.isRawJSON?.(value));
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value) && !isRaw(value);
const entries = (value) => (isObject(value) ? Object.entries(value) : []);
const list = (value) => (Array.isArray(value) ? value : []);
const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

function unescaped(part) {
  try { part = decodeURIComponent(part); } catch { /* not escaped */ }
  return part.replaceAll("~1", "/").replaceAll("~0", "~");
}
const at = (ref) => ref.split("/").slice(1).reduce((value, part) => value?.[unescaped(part)], doc);
const lastPart = (ref) => unescaped(ref.slice(ref.lastIndexOf("/") + 1));

/** The object that a chain of references ends at: the same one each time. */
function follow(value) {
  for (let hops = 0; isObject(value) && typeof value.$ref === "string" && hops < 20; hops++) value = at(value.$ref);
  return isObject(value) ? value : {};
}

// -- schemas ----------------------------------------------------------------------------------------------------------

/** A schema without its reference, whose name is kept as `x-name`; what stands beside a reference wins. */
function deref(schema) {
  for (let hops = 0; isObject(schema) && typeof schema.$ref === "string" && hops < 20; hops++) {
    const { $ref, ...beside } = schema;
    const target = at($ref);
    schema = { ...(isObject(target) ? target : {}), "x-name": lastPart($ref), ...beside };
  }
  return isObject(schema) ? schema : {};
}

const DEEPEST = 8;  // Schemas that hold nothing but themselves, such as a list of lists of themselves, have no end.

/** What may stand somewhere: a schema, or several cases, or null beside them. */
function shape(schema, depth = 0) {
  let found = deref(schema);
  if (isObject(found.schema) && found.schemaFormat) found = deref(found.schema);
  if (list(found.allOf).length === 1) {
    const { allOf, ...beside } = found;
    found = { ...deref(allOf[0]), ...beside };
  }
  const cases = list(found.anyOf ?? found.oneOf);
  if (cases.length) {
    const { anyOf, oneOf, ...beside } = found;
    const real = cases.filter((each) => deref(each).type !== "null");
    if (real.length === 1 && depth < DEEPEST) {
      const inner = shape(real[0], depth + 1);
      return { ...inner, schema: { ...inner.schema, ...beside }, nullable: inner.nullable || real.length < cases.length };
    }
    return { schema: beside, cases: real, nullable: real.length < cases.length };
  }
  if (Array.isArray(found.type)) {
    const types = found.type.filter((type) => type !== "null");
    const nullable = types.length < found.type.length;
    if (types.length === 1) return { schema: { ...found, type: types[0] }, nullable };
    return { schema: found, cases: types.map((type) => ({ type })), nullable };
  }
  return { schema: found, nullable: false };
}

/** Its items one by one, in either spelling; null: they are alike. */
const tupleOf = (schema) => (Array.isArray(schema.prefixItems) ? schema.prefixItems : Array.isArray(schema.items) ? schema.items : null);
const titleOf = (schema) => schema.title ?? schema["x-name"] ?? "object";

function label(schema, depth = 0) {
  const { schema: found, cases } = shape(schema);
  if (depth > 4) return "…";
  if (cases) return [...new Set(cases.map((each) => label(each, depth + 1)))].join(" | ");
  if ("const" in found) return found.type ?? typeof found.const;
  if (tupleOf(found)) return `tuple of ${tupleOf(found).length}`;
  if (found.type === "array") return isObject(found.items) ? `array of ${label(found.items, depth + 1)}` : "array";
  if (found.type === "object" || found.properties) {
    if (!found.properties && isObject(found.additionalProperties)) return `map of ${label(found.additionalProperties, depth + 1)}`;
    return found.properties ? titleOf(found) : "object";
  }
  if (found.enum && found["x-name"]) return titleOf(found);
  return found.type ?? (found.enum ? "enum" : "anything");
}

/** What is inside: fields, and above those of each case its name. */
function children(schema, depth = 0) {
  if (depth > DEEPEST) return [];
  const { schema: found, cases } = shape(schema);
  if (cases) {
    const inner = cases.map((each) => [label(each), children(each, depth + 1)]).filter(([, rows]) => rows.length);
    return inner.length === 1 ? inner[0][1] : inner.flatMap(([name, rows]) => [{ case: name }, ...rows]);
  }
  if (found.properties) {
    const required = new Set(list(found.required));
    return entries(found.properties).map(([name, each]) => ({ name, schema: each, required: required.has(name) }));
  }
  if (tupleOf(found)) {
    return tupleOf(found).map((each, index) => ({ name: `[${index}]`, schema: each, required: true }));
  }
  if (isObject(found.items)) return children(found.items, depth + 1);
  return isObject(found.additionalProperties) ? children(found.additionalProperties, depth + 1) : [];
}

const written = (value) => JSON.stringify(value) ?? "";
const span = (low, high, unit) =>
  low !== undefined && high !== undefined ? `${written(low) === written(high) ? written(low) : `${written(low)} to ${written(high)}`} ${unit}`
    : low !== undefined ? `at least ${written(low)} ${unit}` : `at most ${written(high)} ${unit}`;

/** What the values have to be, as pairs of words and code. */
function rules(schema) {
  const { schema: own } = shape(schema);
  const rows = [];
  const some = isObject(own.items) && !own.enum ? shape(own.items).schema : null;
  for (const [found, before] of [[own, ""], ...(some && !some.properties ? [[some, "each "]] : [])]) {
    if ("const" in found) rows.push([`${before}always`, written(found.const)]);
    if (found.format) rows.push([`${before}format`, found.format]);
    if (found.minimum !== undefined) rows.push([`${before}≥`, written(found.minimum)]);
    if (found.exclusiveMinimum !== undefined) rows.push([`${before}>`, written(found.exclusiveMinimum)]);
    if (found.maximum !== undefined) rows.push([`${before}≤`, written(found.maximum)]);
    if (found.exclusiveMaximum !== undefined) rows.push([`${before}<`, written(found.exclusiveMaximum)]);
    if (found.multipleOf !== undefined) rows.push([`${before}multiple of`, written(found.multipleOf)]);
    if ((found.minLength ?? found.maxLength) !== undefined) rows.push([`${before}${span(found.minLength, found.maxLength, "characters")}`]);
    if ((found.minItems ?? found.maxItems) !== undefined && !tupleOf(found)) rows.push([span(found.minItems, found.maxItems, "items")]);
    if ((found.minProperties ?? found.maxProperties) !== undefined) rows.push([span(found.minProperties, found.maxProperties, "entries")]);
    if (found.uniqueItems) rows.push(["no duplicates"]);
    if (found.pattern) rows.push([`${before}matches`, found.pattern]);
    if (found.contentEncoding) rows.push([`${before}encoded as`, found.contentEncoding]);
    if (found.readOnly) rows.push(["computed"]);
    if (found.additionalProperties === false) rows.push(["no other fields"]);
  }
  if ("default" in own && !("const" in own)) rows.push(["default", written(own.default)]);
  const examples = list(own.examples).map(written).filter((text) => text.length <= 60);
  if (examples.length && !("const" in own) && !own.enum) rows.push(["for example", examples.slice(0, 3).join(", ")]);
  return rows;
}

const choices = (schema) => {
  const { schema: found } = shape(schema);
  return list(found.enum ?? (isObject(found.items) ? shape(found.items).schema.enum : undefined));
};

/** A schema that needs nothing else: what it refers to is put below `$defs`. */
function bundled(schema) {
  const $defs = Object.create(null);  // A class may be called "constructor".
  const copy = (value) => {
    if (Array.isArray(value)) return value.map(copy);
    if (!isObject(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => {
      if (key !== "$ref" || typeof each !== "string") return [key, copy(each)];
      const name = lastPart(each);
      if (!(name in $defs)) {
        $defs[name] = {};
        $defs[name] = copy(at(each) ?? {});
      }
      return [key, `#/$defs/${name.replaceAll("~", "~0").replaceAll("/", "~1")}`];
    }));
  };
  const whole = copy(schema.$ref ? follow(schema) : schema);
  return Object.keys($defs).length ? { ...whole, $defs } : whole;
}

const MOST_NAMES = 2000;

/** Names of all fields, nested ones with the names above them. */
function fieldNames(schema) {
  const names = [];
  const walk = (rows, above, refs) => {
    for (const row of rows) {
      if (row.case !== undefined) continue;
      if (names.length >= MOST_NAMES) return;
      const name = above ? `${above}.${row.name}` : row.name;
      names.push(name);
      const inner = children(row.schema);
      const id = inner.map((each) => each.name ?? each.case).join();
      if (inner.length && !refs.has(id) && refs.size < 6) walk(inner, name, new Set(refs).add(id));
    }
  };
  walk(children(schema), "", new Set());
  return names;
}

// -- events -----------------------------------------------------------------------------------------------------------

const KINDS = { kafka: "Kafka", amqp: "RabbitMQ", redis: "Redis" };

function kindOf(name) {
  const lower = String(name ?? "").toLowerCase().replace("rabbitmq", "amqp");
  return Object.keys(KINDS).find((kind) => lower.startsWith(kind)) ?? "other";
}

function readEvents() {
  const channels = new Map();
  for (const [id, each] of entries(doc.channels)) {
    const channel = follow(each);
    for (const [, message] of entries(channel.messages)) {
      const found = follow(message);
      channels.set(found, [...(channels.get(found) ?? []), { id, ...channel }]);
    }
  }
  const keys = new Map(entries(doc.components?.messages).map(([key, message]) => [follow(message), key]));
  for (const message of channels.keys()) if (!keys.has(message)) keys.set(message, message.name ?? message.title ?? "event");
  const events = [...keys].map(([message, key]) => readEvent(message, key, channels.get(message) ?? []));
  const types = new Map();
  for (const event of events) types.set(event.type, (types.get(event.type) ?? 0) + 1);
  const taken = new Set();
  for (const event of events) {
    event.anchor = types.get(event.type) === 1 ? event.type : event.cls || event.key;
    if (taken.has(event.anchor)) event.anchor = event.key;
    taken.add(event.anchor);
  }
  return events;
}

function readEvent(message, key, channels) {
  const cls = message["x-dispytch-class"] ?? "";
  const module = message["x-dispytch-module"] ?? cls.slice(0, Math.max(cls.lastIndexOf("."), 0));
  const channel = channels[0] ?? {};
  const named = list(channel.servers).map((server) => lastPart(server.$ref ?? ""));
  const broker = message["x-dispytch-broker"] ?? channel["x-dispytch-broker"] ?? named[0] ?? "";
  const server = doc.servers?.[broker] ? follow(doc.servers[broker]) : null;
  const bindings = { ...follow(channel.bindings), ...follow(message.bindings) };
  const transport = message["x-dispytch-transport"] ?? Object.keys(bindings)[0] ?? server?.protocol;
  return {
    message, key, cls, module, broker, server, channel,
    kind: kindOf(transport),
    transport: KINDS[kindOf(transport)] ?? transport ?? "unknown transport",
    name: message.title ?? (cls ? cls.slice(cls.lastIndexOf(".") + 1) : message.name ?? key),
    type: message.name ?? key,
    about: [message.summary, message.description].filter(Boolean).join("\n\n"),
    address: addressOf(channel),
    exchange: follow(channel.bindings).amqp?.exchange ?? null,
    ordering: message["x-dispytch-ordering-key"] ?? null,
    deprecated: Boolean(message.deprecated ?? message["x-dispytch-deprecated"]),
    examples: list(message.examples).filter((example) => isObject(example) && "payload" in example),
  };
}

/** Braces that are meant are written %7B and %7D, and parts by the names that AsyncAPI allows. */
function asWritten(address, parameters) {
  return address.replace(/\{([^{}]*)\}/g, (whole, name) => follow(parameters?.[name])["x-dispytch-part"] ?? whole).replace(/%7B/g, "{").replace(/%7D/g, "}");
}

const addressOf = (channel) =>
  channel["x-dispytch-kind"] === "exchange" && channel.title ? channel.title : asWritten(channel.address ?? channel.title ?? channel.id ?? "", channel.parameters);

// By the names that are shown.
const events = readEvents().sort((a, b) => a.name.localeCompare(b.name));
const byAnchor = new Map();
for (const event of events) {
  for (const name of [event.cls, event.key, event.name]) if (name && !byAnchor.has(name)) byAnchor.set(name, event);
}
for (const event of events) byAnchor.set(event.anchor, event);

/** In the order of the servers, then of the names. Where no server is known, an alias may stand for several brokers. */
function grouped(some, by) {
  const groups = new Map(by === "broker" ? Object.keys(doc.servers ?? {}).map((name) => [name, []]) : []);
  const others = new Map();
  for (const event of some) {
    const broker = event.server ? event.broker : `${event.broker || event.transport}\0${event.transport}`;
    const name = by === "module" ? event.module || "no module" : broker;
    const into = groups.has(name) ? groups : others;
    if (into.has(name)) into.get(name).push(event);
    else into.set(name, [event]);
  }
  return [...groups, ...[...others].sort(([a], [b]) => (a < b ? -1 : 1))].filter(([, found]) => found.length);
}

// -- search -----------------------------------------------------------------------------------------------------------

let index = null;

function indexed() {
  const words = (name) => `${name} ${name.replace(/([a-z0-9])([A-Z])/g, "$1 $2")}`.toLowerCase();
  index ??= events.map((event) => ({
    event,
    name: words(event.name),
    type: event.type.toLowerCase(),
    address: `${event.address} ${event.channel.address ?? ""} ${event.broker} ${event.transport}`.toLowerCase(),
    fields: fieldNames(event.message.payload).map((name) => [name, name.toLowerCase()]),
    more: `${event.module} ${event.cls}`.toLowerCase(),
    about: event.about.toLowerCase(),
  }));
  return index;
}

/** The events that have every word, the best first: by name, type, place, field, description; with why. */
function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (const entry of indexed()) {
    let score = entry.event.deprecated ? -10 : 0;
    let field = null;
    let about = false;
    const fits = words.every((word) => {
      if (entry.name.startsWith(word)) score += 100;
      else if (entry.name.includes(word)) score += 60;
      else if (entry.type.includes(word)) score += 40;
      else if (entry.address.includes(word)) score += 30;
      else {
        const hit = entry.fields.find(([, name]) => name === word) ?? entry.fields.find(([, name]) => name.includes(word));
        if (hit) {
          score += hit[1] === word ? 25 : 15;
          field ??= hit[0];
        } else if (entry.more.includes(word)) score += 8;
        else if (entry.about.includes(word)) {
          score += 5;
          about = true;
        } else return false;
      }
      return true;
    });
    if (fits) found.push({ event: entry.event, score, field, about: about && !field });
  }
  return { words, found: found.sort((a, b) => b.score - a.score) };
}
