// Runs the network beside the page, so that the page stays responsive. Messages in: {type: "load", ...} once, then
// {type: "draw", request, ...}; a new drawing ends the one before, and so does {type: "stop", request}. Messages out:
// ready, step, done, error.

import * as ort from "./vendor/ort.wasm.min.mjs"
import {sample, seededNoise, toPixels} from "./sampling.js"

let session, imageSize, latest

class Superseded extends Error {}

/** The guided predictions x_hat for images x at the time t. */
async function predict(x, t, label, guidance) {
  const count = x.length/(3*imageSize**2)
  const inputs = {
    xt: new ort.Tensor("float32", x, [count, 3, imageSize, imageSize]),
    t: new ort.Tensor("float32", new Float32Array(count).fill(t), [count]),
    y: new ort.Tensor("int64", new BigInt64Array(count).fill(BigInt(label)), [count]),
    cfg_scale: new ort.Tensor("float32", Float32Array.of(guidance), []),
  }
  const outputs = await session.run(inputs)
  return outputs.x_hat.data
}

/** Whether this browser computes what PyTorch computed when the page was written. */
async function checkArithmetic({seed, label, t, guidance, stride, expected, tolerance}) {
  const xHat = await predict(seededNoise(1, imageSize, seed), t, label, guidance)
  const errors = expected.map((value, i) => Math.abs(value - xHat[i*stride]))
  return errors.every(error => error <= tolerance)
}

async function load({network, threads, selfTest, size}) {
  imageSize = size
  ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href
  ort.env.wasm.numThreads = threads
  ort.env.logLevel = "error"
  const answer = await fetch(network)
  if (!answer.ok) throw new Error(`${network}: ${answer.status} ${answer.statusText}`)
  session = await ort.InferenceSession.create(await answer.arrayBuffer(), {executionProviders: ["wasm"]})
  if (!await checkArithmetic(selfTest)) {
    throw new Error("this browser computes other numbers than PyTorch does, so its images would be wrong")
  }
  postMessage({type: "ready"})
}

/** Let messages in, and end this drawing if there is a newer one. */
async function yieldTo(request) {
  await new Promise(resolve => setTimeout(resolve))
  if (request !== latest) throw new Superseded()
}

async function draw({request, label, guidance, steps, seed, count, solver}) {
  await yieldTo(request)
  const started = performance.now()
  const show = async (xHat, step) => {
    const pixels = toPixels(xHat, count, imageSize)
    postMessage({type: "step", request, step, pixels}, [pixels.buffer])
    await yieldTo(request)
  }
  const noise = seededNoise(count, imageSize, seed)
  await sample((x, t) => predict(x, t, label, guidance), noise, steps, solver, show)
  postMessage({type: "done", request, seconds: (performance.now() - started)/1000})
}

let queue = Promise.resolve() // the network computes one thing at a time

async function handle(data) {
  try {
    if (data.type === "load") await load(data)
    if (data.type === "draw") await draw(data)
  } catch (error) {
    if (error instanceof Superseded) return
    postMessage({type: "error", request: data.request, message: String(error?.message ?? error)})
  }
}

onmessage = ({data}) => {
  latest = data.request
  queue = queue.then(() => handle(data))
}
