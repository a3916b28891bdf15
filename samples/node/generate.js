// Generates with a GGUF export in Node:  node generate.js EXPORT [PROMPT] [TOKENS] [--json]
// A model with a chat template answers the prompt, any other continues it. The settings are those that the export's plan
// promises its memory for. --json prints the tokens in place of the text. THREADS in the environment limits the threads;
// all cores are used by default.
import {existsSync, readFileSync} from "node:fs";
import {join} from "node:path";
import {getLlama, LlamaChatSession, LlamaLogLevel} from "node-llama-cpp";

const asJson = process.argv.includes("--json");
const [directory, prompt = "def main(", tokens = "32"] = process.argv.slice(2).filter((word) => word !== "--json");
if (directory === undefined) {
  console.error("usage: node generate.js EXPORT [PROMPT] [TOKENS] [--json]");
  process.exit(2);
}
const plan = JSON.parse(readFileSync(join(directory, "plan.json"), "utf8"));
if (plan.format !== "gguf" || plan.layout === "factored") {
  console.error(`${directory} is ${plan.format} (${plan.layout}); node-llama-cpp runs gguf, stock or lora`);
  process.exit(2);
}
const {context: contextSize, prompt_batch: batchSize} = plan.serving;
const [keys, values] = [plan.serving.cache_type_k, plan.serving.cache_type_v].map((type) => type.toUpperCase());

// The plan counts memory of the processor; with gpu: "auto" some of it moves to the graphics card.
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
// Of a model in several files, the first.
const [file] = Object.keys(plan.files).filter((name) => name !== "adapter.gguf").sort();
const model = await llama.loadModel({modelPath: join(directory, file)});
const adapter = join(directory, "adapter.gguf");
const context = await model.createContext({
  contextSize,
  batchSize,
  flashAttention: true,
  threads: Number(process.env.THREADS ?? 0), // 0: all
  experimentalKvCacheKeyType: keys,
  experimentalKvCacheValueType: values,
  ...(existsSync(adapter) ? {lora: adapter} : {})
});

const show = (text) => asJson || process.stdout.write(text);
const chats = model.fileInfo.metadata.tokenizer?.chat_template !== undefined;
const output = [];
let input = model.tokenize(prompt);
// Text that is continued begins as the model's texts do; what a template writes brings its own.
if (!chats && model.tokens.shouldPrependBosToken) input.unshift(model.tokens.bos);
const room = Math.min(Number(tokens), contextSize - input.length);
if (chats) {
  const session = new LlamaChatSession({contextSequence: context.getSequence()});
  session.setChatHistory([]); // without it the library's own system prompt takes 190 tokens
  await session.prompt(prompt, {maxTokens: room, temperature: 0, onTextChunk: show, onToken: (some) => output.push(...some)});
  // What was written around the prompt, and what is held of the answer.
  input = session.sequence.contextTokens;
} else if (room > 0) {
  show(prompt);
  for await (const token of context.getSequence().evaluate(input, {temperature: 0, yieldEogToken: true})) {
    show(model.detokenize([token]));
    output.push(token);
    if (output.length >= room) break;
  }
}
console.log(asJson ? JSON.stringify({input, output}) : "");
await llama.dispose();
