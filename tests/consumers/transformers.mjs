// Runs exports with transformers.js as a Node application does.
// Usage: node transformers.mjs PACKAGES EXPORT..., a request as JSON on standard input:
//   {"texts": [...], "prompt": [ids], "count": n}
// Prints for each export, as one JSON list: {"ids": token ids of every text, "tokens": the new tokens chosen greedily}.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [packages, ...directories] = process.argv.slice(2);
const request = JSON.parse(readFileSync(0, "utf8"));
const entry = createRequire(join(resolve(packages), "package.json")).resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(pathToFileURL(entry).href);
env.allowRemoteModels = false;

const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

async function answer(directory) {
  env.localModelPath = dirname(resolve(directory));
  const name = basename(resolve(directory));
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const ids = request.texts.map((text) => tokenizer.encode(text));
  const model = await AutoModelForCausalLM.from_pretrained(name);
  const output = await model.generate({
    input_ids: tensor(request.prompt),
    attention_mask: tensor(request.prompt.map(() => 1)),
    do_sample: false,
    max_new_tokens: request.count,
    min_new_tokens: request.count,
  });
  return { ids, tokens: output.tolist()[0].slice(request.prompt.length).map(Number) };
}

const answers = [];
for (const directory of directories) answers.push(await answer(directory));
console.log(JSON.stringify(answers));
