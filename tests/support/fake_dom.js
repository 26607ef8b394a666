// Runs the script of a report without a browser: `node fake_dom.js PAGE` prints what its sample viewer shows.
"use strict";
const fs = require("fs");
const page = fs.readFileSync(process.argv[2], "utf8");
const data = page.split('id="data">')[1].split("</script>")[0];
const script = page.split("<script>").pop().split("</script>")[0];

class Node {
  constructor(tag) { this.tag = tag; this.children = []; this.attributes = {}; this.style = {}; this.listeners = {}; this.value = ""; this.className = ""; }
  get classList() { return { add: (name) => { this.className += " " + name; } }; }
  get firstChild() { return this.children[0] ?? (this.append(new Node("x")), this.children[0]); }
  get lastChild() { if (this.children.length < 2) this.append(new Node("x"), new Node("x")); return this.children[this.children.length - 1]; }
  get textContent() { return this.children.map((child) => typeof child === "string" ? child : child.textContent).join(""); }
  set textContent(text) { this.children = [String(text)]; }
  get namespaceURI() { return "svg"; }
  get clientWidth() { return 400; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
}
const byId = {};
globalThis.document = {
  getElementById: (id) => (byId[id] ??= new Node(id)),
  createElement: (tag) => new Node(tag),
  createElementNS: (_, tag) => new Node(tag),
  addEventListener: () => {},
};
globalThis.ResizeObserver = class { observe() {} };
document.getElementById("data").textContent = data;
(0, eval)(script);

const shown = (node) => typeof node === "string" ? node : { tag: node.tag, kind: node.className, text: node.textContent, children: node.children.map(shown) };
const found = [];
for (;;) {
  found.push(shown(byId.sample));
  if (byId.next.disabled) break;
  byId.next.listeners.click();
}
console.log(JSON.stringify(found));
