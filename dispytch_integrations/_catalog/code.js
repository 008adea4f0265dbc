// Code that the page shows: JSON and Python with colours, and the snippets that emit and consume an event.

const JSON_PARTS = /("(?:\\.|[^"\\])*")(\s*:)?|\b(true|false|null)\b|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
const PYTHON_PARTS = /(#.*)|([rf]?"(?:\\.|[^"\\])*")|\b(from|import|async|await|with|for|in|if|as|def|class|None|True|False|continue)\b|\b\d[\d_]*(?:\.\d+)?\b/g;

const TEMPLATE = /\{[^{}]+\}/g;

/** The text as nodes, what is found in `parts` with the class that `classify` gives. */
function coloured(text, parts, classify) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(parts)) {
    if (match.index > last) nodes.push(text.slice(last, match.index));
    const kind = classify(match);
    nodes.push(h("span", { class: kind }, kind === "k" && match[2] ? match[1] : match[0]));
    if (kind === "k" && match[2]) nodes.push(match[2]);
    last = match.index + match[0].length;
  }
  nodes.push(text.slice(last));
  return nodes;
}
const colouredJSON = (text) => coloured(text, JSON_PARTS, (match) => (match[1] ? (match[2] ? "k" : "s") : match[3] ? "w" : "n"));
const colouredPython = (text) => coloured(text, PYTHON_PARTS, (match) => (match[1] ? "c" : match[2] ? "s" : match[3] ? "w" : "n"));

function python(value, indent) {
  const inner = `${indent}    `;
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (isRaw(value)) return value.rawJSON;
  if (typeof value !== "object") return JSON.stringify(value);
  const open = Array.isArray(value) ? "[" : "{";
  const close = Array.isArray(value) ? "]" : "}";
  const parts = Array.isArray(value)
    ? value.map((each) => python(each, inner))
    : Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${python(each, inner)}`);
  const line = `${open}${parts.join(", ")}${close}`;
  if (line.length + indent.length < 56 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${inner}${part},\n`).join("")}${indent}${close}`;
}

/** Fields with exclude=True that the route, the key or a header needs, with an example as far as it is known. */
function missingFields(event) {
  const body = shape(event.message.payload ?? {}).schema.properties ?? {};
  const headers = entries(shape(event.message.headers ?? {}).schema.properties).map(([, header]) => header["x-dispytch-template"]);
  const missing = new Map();
  const add = (part, value) => {
    const [path] = part.replace(/[{}]/g, "").split(/[:!]/);
    const field = path.split(/[.[]/)[0];
    if (field && !Object.hasOwn(body, field) && missing.get(field) === undefined) missing.set(field, path === field ? value : undefined);
  };
  for (const [name, each] of [...entries(event.channel.parameters), ...entries(event.channel["x-dispytch-exchange-parameters"])]) {
    const parameter = follow(each);
    if (parameter.default !== undefined) continue;
    add(parameter["x-dispytch-part"] ?? name, list(parameter.examples)[0] ?? list(parameter.enum)[0]);
  }
  for (const template of [event.ordering, ...headers]) for (const [part] of String(template ?? "").matchAll(TEMPLATE)) add(part, undefined);
  return missing;
}

const IDENTIFIER = /^(?!(?:and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield)$)[A-Za-z_]\w*$/;
const pythonBytes = (text) => (/^[ -~]*$/.test(text) ? `b${JSON.stringify(text)}` : `${JSON.stringify(text)}.encode()`);
/** An address with a wildcard in the place of its parts. */
const wildcards = (address) => asWritten(address.replace(TEMPLATE, "*"), null);

function emitSnippet(event) {
  if (!event.cls) return null;
  const path = event.module && event.cls.startsWith(`${event.module}.`) ? event.cls.slice(event.module.length + 1) : event.name;
  const local = path.includes("<locals>");
  const name = local ? path.slice(path.lastIndexOf(".") + 1) : path;
  const properties = shape(event.message.payload).schema.properties ?? {};
  const example = isObject(event.examples[0]?.payload) ? event.examples[0].payload : {};
  const lines = [];
  for (const [field, value] of missingFields(event)) {
    lines.push(`        ${field}=${value === undefined ? "..." : python(value, "        ")},  # not in the body`);
  }
  const odd = {};
  for (const [field, value] of Object.entries(example)) {
    if (shape(properties[field] ?? {}).schema.readOnly) continue;
    if (IDENTIFIER.test(field)) lines.push(`        ${field}=${python(value, "        ")},`);
    else odd[field] = value;
  }
  if (Object.keys(odd).length) lines.push(`        **${python(odd, "        ")},`);
  const made = lines.length ? `    ${name}(\n${lines.join("\n")}\n    )\n` : `    ${name}(...)\n`;
  const imported = local ? `# ${name} is defined inside a function of ${event.module}` : `from ${event.module} import ${name.split(".")[0]}`;
  return `${imported}\n\nawait emitter.emit(\n${made})`;
}

/** The name of the header that carries the event's type; null: none does. */
function typeHeader(event) {
  const headers = shape(event.message.headers ?? {}).schema.properties ?? {};
  const always = (schema) => shape(schema).schema.const ?? list(shape(schema).schema.enum)[0];
  return Object.keys(headers).find((name) => /type$/.test(name) && always(headers[name]) === event.type) ?? null;
}

const escaped = (text) => text.replace(/[.*+?^$()|[\]\\]/g, "\\$&");

/** A consumer in the client library of the transport. Null: there is none that we know to be true. */
function consumeSnippet(event) {
  const { channel, message } = event;
  if (!/json$/.test(message.contentType ?? doc.defaultContentType ?? "application/json") || message["x-dispytch-tombstone"]) return null;
  const make = { kafka: fromKafka, amqp: fromRabbitMQ, redis: channel["x-dispytch-kind"] === "stream" ? fromStream : fromPubSub }[event.kind];
  if (!make || !channel.address) return null;
  const { server } = event;
  const known = server && server.host !== "in-process";
  const hosts = known ? (list(server["x-hosts"]).length ? server["x-hosts"] : [server.host]) : [];
  const guarded = known && (list(server.security).length > 0 || /secure|s$/.test(server.protocol ?? ""));
  return (guarded ? "# This broker asks for a login, or for TLS: add yours.\n" : "") + make(event, typeHeader(event), hosts);
}

const schemeOf = (event, plain) => (event.server?.protocol === `${plain}s` ? `${plain}s` : plain);

function fromKafka(event, header, hosts) {
  const { address } = event.channel;
  const pattern = address.split(TEMPLATE).map(escaped).join("[^.]+");
  const many = address.split(TEMPLATE).length > 1;
  const lines = [
    "import json", "", "from aiokafka import AIOKafkaConsumer", "", "consumer = AIOKafkaConsumer(",
    many ? null : `    ${JSON.stringify(address)},`,
    `    bootstrap_servers=${JSON.stringify(hosts.join(",") || "localhost:9092")},`, '    group_id="my-service",', '    auto_offset_reset="earliest",', ")",
    many ? `consumer.subscribe(pattern=r"^${pattern}$")` : null,
    "async with consumer:", "    async for record in consumer:",
    ...(header ? [`        if dict(record.headers).get(${JSON.stringify(header)}) != ${pythonBytes(event.type)}:`, "            continue"] : []),
    "        event = json.loads(record.value)", "        print(event)",
  ];
  return `${lines.filter((line) => line !== null).join("\n")}\n`;
}

function fromRabbitMQ(event, header, [host]) {
  const { exchange, channel } = event;
  const many = channel.address.split(TEMPLATE).length > 1;
  // A name with parts is another exchange for each value, and a wildcard in a key is known to topic exchanges alone.
  if (!exchange?.name || exchange.name.includes("{") || (many && !["topic", undefined].includes(exchange.type))) return null;
  const vhost = exchange.vhost && exchange.vhost !== "/" ? encodeURIComponent(exchange.vhost) : "";
  const lines = [
    "import json", "", "import aio_pika", "",
    `connection = await aio_pika.connect(${JSON.stringify(`${schemeOf(event, "amqp")}://${host ?? "localhost:5672"}/${vhost}`)})`,
    "async with connection:", "    channel = await connection.channel()",
    `    exchange = await channel.get_exchange(${JSON.stringify(exchange.name)})`,
    '    queue = await channel.declare_queue("my-service", durable=True)',
    `    await queue.bind(exchange, ${JSON.stringify(wildcards(channel.address))})`,
    "    async with queue.iterator() as messages:", "        async for message in messages:", "            async with message.process():",
    ...(header ? [`                if message.headers.get(${JSON.stringify(header)}) != ${JSON.stringify(event.type)}:`, "                    continue"] : []),
    "                event = json.loads(message.body)", "                print(event)",
  ];
  return `${lines.join("\n")}\n`;
}

const redisHead = (event, host) => ["import json", "", "from redis.asyncio import Redis", "", `redis = Redis.from_url(${JSON.stringify(`${schemeOf(event, "redis")}://${host ?? "localhost:6379"}`)})`];

function fromStream(event, header, [host]) {
  const { address } = event.channel;
  if (address.split(TEMPLATE).length > 1) return null;  // XREAD takes names, no pattern.
  const lines = [
    ...redisHead(event, host), 'last = "$"  # what comes from now on; "0": from the beginning', "while True:",
    `    for _, entries in await redis.xread({${JSON.stringify(wildcards(address))}: last}, block=5000):`,
    "        for last, fields in entries:",
    ...(header ? [`            if fields.get(b${JSON.stringify(header)}) != ${pythonBytes(event.type)}:`, "                continue"] : []),
    '            event = json.loads(fields[b"data"])', "            print(event)",
  ];
  return `${lines.join("\n")}\n`;
}

function fromPubSub(event, header, [host]) {
  const { address } = event.channel;
  const pattern = wildcards(address);
  const p = address.split(TEMPLATE).length > 1 ? "p" : "";
  const lines = [
    ...redisHead(event, host), "async with redis.pubsub() as channel:", `    await channel.${p}subscribe(${JSON.stringify(pattern)})`,
    "    async for message in channel.listen():", `        if message["type"] == "${p}message":`,
    '            event = json.loads(message["data"])', "            print(event)",
  ];
  return `${lines.join("\n")}\n`;
}
