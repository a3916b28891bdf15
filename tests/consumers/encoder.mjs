// Runs exported encoders in transformers.js, as a Node application does.
// Usage: node encoder.mjs PACKAGES EXPORT..., a request as JSON on standard input: {"texts": [...]}
// Prints for each export, as one JSON list: {"ids": token ids of every text, "outputs": all outputs of the graph by name,
// "pipeline": what the pipeline of its task makes of the texts}.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [packages, ...directories] = process.argv.slice(2);
const request = JSON.parse(readFileSync(0, "utf8"));
const entry = createRequire(join(resolve(packages), "package.json")).resolve("@huggingface/transformers");
const js = await import(pathToFileURL(entry).href);
js.env.allowRemoteModels = false;

const pooled = async (extract) => (await extract(request.texts, { pooling: "mean", normalize: true })).tolist();
const scores = (classify) => classify(request.texts, { top_k: null });
// By the end of the class name in config.json: class to load, task of the pipeline, its call.
const KINDS = [
  ["ForSequenceClassification", js.AutoModelForSequenceClassification, "text-classification", scores],
  ["ForMaskedLM", js.AutoModelForMaskedLM, "fill-mask", null],
  ["Model", js.AutoModel, "feature-extraction", pooled],
];

async function answer(directory) {
  js.env.localModelPath = dirname(resolve(directory));
  const name = basename(resolve(directory));
  const [architecture] = JSON.parse(readFileSync(join(directory, "config.json"), "utf8")).architectures;
  const [, kind, task, call] = KINDS.find(([ending]) => architecture.endsWith(ending));
  const tokenizer = await js.AutoTokenizer.from_pretrained(name);
  const model = await kind.from_pretrained(name);
  const found = await model(tokenizer(request.texts, { padding: true }));
  const outputs = Object.fromEntries(model.sessions.model.outputNames.map((key) => [key, found[key].tolist()]));
  const ids = request.texts.map((text) => tokenizer.encode(text));
  return { ids, outputs, pipeline: call && (await call(await js.pipeline(task, name))) };
}

const answers = [];
for (const directory of directories) answers.push(await answer(directory));
console.log(JSON.stringify(answers));
