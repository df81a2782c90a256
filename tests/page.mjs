// The page of the API's document without a browser: the parts of the DOM that it uses, its own script, and a person
// who opens an operation, fills in what is asked and sends it. Prints what that person can read.
import vm from "node:vm";

const [root, key, wanted, ...filled] = process.argv.slice(2);

class Element {
  constructor(name) {
    Object.assign(this, { name, children: [], text: "", value: "", listeners: {}, hidden: false });
  }
  set textContent(text) {
    this.text = String(text);
    this.children = [];
  }
  get textContent() {
    return this.text + this.children.map((child) => child.textContent ?? child).join("");
  }
  get lastChild() {
    return this.children.at(-1);
  }
  append(...children) {
    this.children.push(...children);
  }
  prepend(...children) {
    this.children.unshift(...children);
  }
  setAttribute() {}
  addEventListener(name, listener) {
    this.listeners[name] = listener;
  }
  all(name) {
    const below = this.children.filter((child) => child instanceof Element).flatMap((child) => child.all(name));
    return this.name === name ? [this, ...below] : below;
  }
}

const places = { key: new Element("input"), about: new Element("p"), operations: new Element("main") };
places.key.value = key;
globalThis.document = { createElement: (name) => new Element(name), getElementById: (id) => places[id] };
globalThis.location = { pathname: "/schema" };
const fetchFrom = globalThis.fetch;
globalThis.fetch = (address, options) => fetchFrom(root + address, options);

async function until(isSo) {
  for (let tries = 0; !isSo() && tries < 500; tries++) await new Promise((done) => setTimeout(done, 10));
}

const page = await (await fetchFrom(`${root}/schema`)).text();
vm.runInThisContext(page.match(/<script>(.*?)<\/script>/s)[1]);
await until(() => places.operations.children.length);
const operations = places.operations.all("details").filter((each) => each.all("summary")[0].all("code").length);
const named = (each) => each.all("b")[0].textContent + " " + each.all("code")[0].textContent;
const chosen = operations.find((each) => named(each) === wanted);
const inputs = [...chosen.all("input"), ...chosen.all("textarea")];
inputs.forEach((input, index) => {
  if (filled[index] !== undefined) input.value = filled[index];
});
chosen.all("button")[0].listeners.click();
const output = chosen.all("pre")[0];
await until(() => / ms$/.test(output.textContent));
console.log(JSON.stringify({ operations: operations.map(named), about: places.about.textContent, output: output.textContent }));
