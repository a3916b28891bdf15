// Which build of onnxruntime-web the page uses, decided before any module loads.
// The build with WebGPU has no CPU kernel for quantized embeddings (GatherBlockQuantized), so WebAssembly has its own.
"use strict";
const device = new URLSearchParams(location.search).get("device") ?? "wasm";
const [bundle, binary] = device === "webgpu"
  ? ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify"]
  : ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded"];
const dist = "/packages/onnxruntime-web/dist";
globalThis.runtime = { device, wasmPaths: { mjs: `${dist}/${binary}.mjs`, wasm: `${dist}/${binary}.wasm` } };
const map = document.createElement("script");
map.type = "importmap";
map.textContent = JSON.stringify({
  imports: {
    "@huggingface/transformers": "/packages/@huggingface/transformers/dist/transformers.web.js",
    "onnxruntime-common": "/packages/onnxruntime-common/dist/esm/index.js",
    "onnxruntime-web/webgpu": `${dist}/${bundle}`,
  },
});
document.head.append(map);
