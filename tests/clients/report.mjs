// What the JavaScript programs here share; see report.py, whose scenarios and words are the same.
const [baseURL, key, brokeKey, model, ...named] = process.argv.slice(2);
export { baseURL, key, brokeKey, model };
export const city = { name: "Köln", inhabitants: 1_087_000 };

// Counts what a client really sent, and keeps the ids of what it was answered.
export function wire() {
  const seen = { sentAt: [], requestIds: [] };
  seen.fetch = async (...request) => {
    seen.sentAt.push(performance.now());
    const answer = await fetch(...request);
    seen.requestIds.push(answer.headers.get("x-request-id"));
    return answer;
  };
  return seen;
}

export const wish = (behaviour) => `!fake ${JSON.stringify(behaviour)}`;

// The exception that `call` throws, as `described` by the client's own fields.
export async function failure(call, described) {
  const seen = wire();
  try {
    await call(seen);
  } catch (error) {
    return {
      classes: classes(error),
      ...described(error),
      attempts: seen.sentAt.length,
      waited_s: seen.sentAt.length ? (seen.sentAt.at(-1) - seen.sentAt[0]) / 1000 : 0,
    };
  }
  return { classes: [] };
}

// The names of the error's class and of those that it extends.
function classes(error) {
  const names = [];
  for (let kind = error.constructor; kind.name; kind = Object.getPrototypeOf(kind)) names.push(kind.name);
  return names;
}

export async function report(usual, special = {}) {
  const scenarios = { ...usual, ...special };
  const seen = {};
  for (const name of named.length ? named : Object.keys(usual)) {
    try {
      seen[name] = await scenarios[name]();
    } catch (error) {
      seen[name] = { crashed: error.stack };
    }
  }
  console.log(JSON.stringify(seen));
}
