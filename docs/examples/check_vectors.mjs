// Check answers against golden vectors: node check_vectors.mjs VECTORS ANSWERS
// Written from docs/vectors.md alone; it needs no package.
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

const SPEC_MAJOR = "1", SIZES = { F64: 8, F32: 4, F16: 2, BF16: 2, I32: 4, U8: 1 };

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function bfloat(bits) {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint32(0, bits * 65536);
  return view.getFloat32(0);
}

const READ = {
  F64: (view, at) => view.getFloat64(at, true),
  F32: (view, at) => view.getFloat32(at, true),
  F16: (view, at) => half(view.getUint16(at, true)),
  BF16: (view, at) => bfloat(view.getUint16(at, true)),
  I32: (view, at) => view.getInt32(at, true),
  U8: (view, at) => view.getUint8(at),
};

/** Return the tensors of a safetensors file: dtype, shape and numbers by name. */
function parse(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = Number(view.getBigUint64(0, true)), tensors = {};
  const header = JSON.parse(bytes.subarray(8, 8 + length).toString("utf8"));
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const count = shape.reduce((a, b) => a * b, 1), size = SIZES[dtype];
    if (!size || to - from !== count * size) throw new Error(`${name} has a wrong header`);
    const first = 8 + length + from;
    const data = Array.from({ length: count }, (_, i) => READ[dtype](view, first + i * size));
    tensors[name] = { dtype, shape, data };
  }
  return tensors;
}

function checkBound(value, bound, defined, actual) {
  for (let i = 0; i < value.data.length; i++) {
    if (defined && !defined.data[i]) continue;
    const a = actual.data[i], v = value.data[i], b = bound.data[i];
    const right = !Number.isNaN(a) && (b === Infinity || a === v || Math.abs(a - v) <= b);
    if (!right) return `element ${i} must be ${v} +- ${b}, but is ${a}`;
  }
}

function checkExact(value, defined, actual) {
  if (actual.dtype !== value.dtype) return `dtype must be ${value.dtype}, but is ${actual.dtype}`;
  const wrong = value.data.findIndex((v, i) => (!defined || defined.data[i]) && v !== actual.data[i]);
  if (wrong >= 0) return `element ${wrong} must be ${value.data[wrong]}, but is ${actual.data[wrong]}`;
}

function checkRow(ids, kind, s, e, ties) {
  const chosen = ids.filter((i) => i >= 0), visible = [...kind.keys()].filter((i) => kind[i]);
  const padding = ids.slice(chosen.length).every((i) => i === -1);
  if (!padding || chosen.some((id, n) => n && id <= chosen[n - 1])) return "does not ascend";
  if (chosen.some((i) => !kind[i])) return "selects a block that is not visible";
  if (visible.some((i) => kind[i] === 1 && !chosen.includes(i))) return "misses a forced block";
  if (chosen.length !== Math.min(ids.length, visible.length)) return "has the wrong length";
  for (const i of chosen.filter((i) => kind[i] === 2))
    for (const j of visible.filter((j) => !chosen.includes(j))) {
      const bounded = e[i] !== Infinity && e[j] !== Infinity;
      if (bounded && s[j] - e[j] > s[i] + e[i]) return `passes block ${j} over for ${i}`;
      const close = Math.abs(s[i] - s[j]) <= 1e-12 * Math.max(Math.abs(s[i]), Math.abs(s[j]));
      if (ties && j < i && (s[i] === s[j] || close)) return `breaks a tie of ${j} and ${i}`;
    }
}

function checkCertificate({ value, bound, kind }, ties, actual, budget) {
  if (actual.dtype !== "I32") return `dtype must be I32, but is ${actual.dtype}`;
  const [heads, rows, blocks] = value.shape;
  for (let r = 0; r < heads * rows; r++) {
    const cut = (x, width, row) => x.data.slice(row * width, (row + 1) * width);
    const scores = [cut(value, blocks, r), cut(bound, blocks, r)];
    const wrong = checkRow(cut(actual, budget, r), cut(kind, blocks, r % rows), ...scores, ties);
    if (wrong) return `head ${Math.floor(r / rows)}, query ${r % rows}: ${wrong}`;
  }
}

function checkResult(result, stored, answers, budget) {
  const actual = answers[result.name], [value, bound, kind, defined] =
    ["value", "bound", "kind", "defined"].map((part) => stored[`${result.name}.${part}`]);
  if (!actual) return result.optional ? undefined : "is missing";
  const shape = result.check === "certificate" ? [...value.shape.slice(0, 2), budget] : value.shape;
  if (`${actual.shape}` !== `${shape}`) return `shape must be [${shape}], but is [${actual.shape}]`;
  if (result.check === "certificate")
    return checkCertificate({ value, bound, kind }, result.ties, actual, budget);
  if (result.check === "exact") return checkExact(value, defined, actual);
  return checkBound(value, bound, defined, actual);
}

const [vectors, answers] = process.argv.slice(2);
const manifest = JSON.parse(readFileSync(join(vectors, "manifest.json"), "utf8"));
if (manifest.format !== "infllmv2-vectors" || manifest.format_version !== 1)
  throw new Error("not a set of vectors of format version 1");
if (manifest.spec_version.split(".")[0] !== SPEC_MAJOR)
  throw new Error(`the set is of specification ${manifest.spec_version}`);
const count = { passed: 0, failed: 0, "not claimed": 0 };
for (const { name, bytes, sha256, results, derived } of manifest.vectors) {
  const data = readFileSync(join(vectors, `${name}.safetensors`));
  if (data.length !== bytes || createHash("sha256").update(data).digest("hex") !== sha256)
    throw new Error(`${name} was changed`);
  const file = join(answers, `${name}.safetensors`);
  const stored = parse(data), given = existsSync(file) ? parse(readFileSync(file)) : null;
  const wrong = given && results
    .map((r) => [r.name, checkResult(r, stored, given, derived.budget)])
    .filter(([, problem]) => problem);
  const outcome = !given ? "not claimed" : wrong.length ? "failed" : "passed";
  count[outcome]++;
  console.log(`${outcome} ${name}${wrong?.length ? `: ${wrong[0].join(" ")}` : ""}`);
}
console.log(`${count.passed} passed, ${count.failed} failed, ${count["not claimed"]} not claimed`);
process.exit(count.failed || !count.passed ? 1 : 0);
