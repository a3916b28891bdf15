// Embeds texts with an exported encoder in transformers.js, as a Node application does.
// Usage: node encoder.mjs PACKAGES EXPORT, a request as JSON on standard input: {"texts": [...]}
// Prints {"ids": token ids of every text, "pooled": by the feature-extraction pipeline, "own": by the graph} as JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [packages, directory] = process.argv.slice(2);
const request = JSON.parse(readFileSync(0, "utf8"));
const entry = createRequire(join(resolve(packages), "package.json")).resolve("@huggingface/transformers");
const { AutoModel, AutoTokenizer, env, pipeline } = await import(pathToFileURL(entry).href);

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(directory));
const name = basename(resolve(directory));

const extract = await pipeline("feature-extraction", name);
const pooled = (await extract(request.texts, { pooling: "mean", normalize: true })).tolist();

const tokenizer = await AutoTokenizer.from_pretrained(name);
const ids = request.texts.map((text) => tokenizer.encode(text));
const model = await AutoModel.from_pretrained(name);
const output = await model(tokenizer(request.texts, { padding: true }));
console.log(JSON.stringify({ ids, pooled, own: output.sentence_embedding.tolist() }));
