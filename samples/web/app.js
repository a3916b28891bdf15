// Loads /model with transformers.js and talks to it in this page: a conversation where its tokenizer has a chat template,
// else a continued text. ?device=webgpu uses the graphics card where there is one.
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "@huggingface/transformers";

const element = (id) => document.getElementById(id);
const { device, wasmPaths } = globalThis.runtime;

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = wasmPaths;

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;

async function load() {
  const files = new Map();
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status !== "progress" || !total) return; // other reports repeat the sums
    files.set(file, { loaded, total });
    const sum = (key) => [...files.values()].reduce((before, entry) => before + entry[key], 0);
    element("progress").value = sum("loaded") / sum("total");
  };
  const started = performance.now();
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  const model = await AutoModelForCausalLM.from_pretrained("model", { device, progress_callback });
  const seconds = (performance.now() - started) / 1000;
  const bytes = [...files.values()].reduce((before, entry) => before + entry.total, 0);
  const plan = await fetch("/model/plan.json").then((answer) => (answer.ok ? answer.json() : {}));
  const chats = Boolean(tokenizer.chat_template);
  element("about").textContent =
    `${plan.model ?? model.config.model_type}, ${megabytes(bytes)} on ${device}, loaded in ${seconds.toFixed(1)} s, ` +
    `${model.config.max_position_embeddings} tokens of context`;
  element("progress").hidden = true;
  if (chats) {
    element("label").textContent = "Message";
    element("prompt").value = "What is the capital of France?";
    element("count").value = 128;
    element("run").textContent = "Send";
    element("anew").hidden = false;
  }
  return { tokenizer, model, chats };
}

// What was said so far: { role, content }.
const history = [];

// The tokens of a conversation that leaves a quarter of the context for the answer; its beginning is forgotten for that.
function written(tokenizer, prompt, context) {
  for (;;) {
    const messages = [...history, { role: "user", content: prompt }];
    const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
    if (inputs.input_ids.dims[1] <= 0.75 * context || history.length === 0) return inputs;
    history.splice(0, 2);
  }
}

async function generate({ tokenizer, model, chats }) {
  const output = element("output");
  const prompt = element("prompt").value;
  const context = model.config.max_position_embeddings;
  const inputs = chats ? written(tokenizer, prompt, context) : tokenizer(prompt);
  const room = context - inputs.input_ids.dims[1];
  const max_new_tokens = Math.min(Number(element("count").value), room);
  if (max_new_tokens < 1) throw new Error(`the prompt leaves no room: the context is ${context} tokens`);
  const temperature = Number(element("temperature").value);
  const asked = document.createTextNode(chats ? `> ${prompt}\n` : prompt);
  if (chats) output.append(output.hasChildNodes() ? "\n\n" : "", asked, document.createElement("b"));
  else output.replaceChildren(asked, document.createElement("b"));
  let count = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: chats,
    callback_function: (text) => output.lastChild.append(text),
    token_callback_function: () => { count += 1; },
  });
  const started = performance.now();
  await model.generate({ ...inputs, max_new_tokens, streamer, do_sample: temperature > 0, ...(temperature > 0 && { temperature }) });
  const seconds = (performance.now() - started) / 1000;
  if (chats) history.push({ role: "user", content: prompt }, { role: "assistant", content: output.lastChild.textContent });
  element("status").textContent = `${count} tokens in ${seconds.toFixed(2)} s, ${(count / seconds).toFixed(1)} tokens/s`;
}

const fail = (error) => {
  element("status").textContent = `Failed: ${error.message ?? error}`;
  document.body.dataset.state = "failed";
};

try {
  const loaded = await load();
  element("run").disabled = false;
  document.body.dataset.state = "ready";
  element("anew").addEventListener("click", () => {
    history.length = 0;
    element("output").replaceChildren();
    element("status").textContent = "";
  });
  element("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    element("run").disabled = true;
    try {
      await generate(loaded);
      document.body.dataset.state = "done";
    } catch (error) {
      fail(error);
    }
    element("run").disabled = false;
  });
} catch (error) {
  element("about").textContent = "The model could not be loaded.";
  fail(error);
}
