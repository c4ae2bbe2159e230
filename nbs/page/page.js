// The controls and the canvases. The images are computed in worker.js; page.json says what there is to draw.

const $ = id => document.getElementById(id)
const IDS = ["class", "guidance", "steps", "seed", "count"]

let config, worker
let request = 0 // of the newest drawing
let current = null // the settings of that drawing
let isDone = false // whether it is finished
let notice = "" // what the address asked for and cannot be had

/** Show what is going on; screen readers announce what is not mere progress. */
function setStatus(state, text) {
  $("status").dataset.state = state
  $("status").textContent = text
  if (state === "done" || state === "error") $("announcement").textContent = text
}

const labelOf = id => document.querySelector(`label[for=${id}]`).textContent

const readable = name => name.replaceAll("_", " ")

/** The settings that the controls show; null if one of them is not usable, which the status then says. */
function readControls() {
  for (const id of IDS) {
    $(id).removeAttribute("aria-invalid")
    if (!$(id).checkValidity()) {
      const {min, max} = $(id)
      setStatus("error", `${labelOf(id)} ${$(id).value || "is empty"}: choose a whole number from ${min} to ${max}`)
      $(id).setAttribute("aria-invalid", "true")
      return null
    }
  }
  const settings = Object.fromEntries(IDS.slice(1).map(id => [id, Number($(id).value)]))
  return {class: $("class").value, ...settings}
}

/** Put settings into the controls; what a control cannot hold is named in the answer and left at its default. */
function writeControls(settings) {
  const refused = []
  for (const id of IDS) {
    if (settings[id] === undefined) continue
    const before = $(id).value
    $(id).value = settings[id]
    if (Number($(id).value) !== Number(settings[id]) && id !== "class" || !$(id).value || !$(id).checkValidity()) {
      refused.push(`${id} ${settings[id]}`)
      $(id).value = before
    }
  }
  showValues()
  return refused
}

function showValues() {
  for (const id of ["guidance", "steps"]) $(`${id}-value`).textContent = $(id).value
}

/** One canvas for each image. */
function prepareCanvases(settings) {
  const canvases = [...$("pictures").children]
  for (let i = canvases.length; i < settings.count; i++) {
    const canvas = document.createElement("canvas")
    canvas.width = canvas.height = config.image_size
    canvas.setAttribute("role", "img")
    $("pictures").append(canvas)
  }
  for (const canvas of canvases.slice(settings.count)) canvas.remove()
  for (const [i, canvas] of [...$("pictures").children].entries()) {
    const name = `${readable(settings.class)}, seed ${settings.seed}, image ${i + 1} of ${settings.count}`
    canvas.setAttribute("aria-label", name)
  }
}

/** Show what a step predicts: bytes of all images, as ImageData takes them. */
function paint(pixels) {
  const size = config.image_size
  const length = size*size*4
  for (const [i, canvas] of [...$("pictures").children].entries()) {
    const image = new ImageData(pixels.subarray(i*length, (i + 1)*length), size, size)
    canvas.getContext("2d").putImageData(image, 0, 0)
  }
}

function draw() {
  const settings = readControls()
  request += 1 // messages about earlier drawings are ignored from now on
  if (!settings) {
    worker.postMessage({type: "stop", request})
    return
  }
  current = settings
  isDone = false
  $("save").disabled = true
  prepareCanvases(settings)
  setStatus("drawing", `Drawing: step 0 of ${settings.steps} …`)
  worker.postMessage({
    type: "draw", request, label: config.classes.indexOf(settings.class), guidance: settings.guidance,
    steps: settings.steps, seed: settings.seed, count: settings.count, solver: config.solver})
}

/** A message of the worker about a drawing; those about earlier drawings are ignored. */
function onMessage({data}) {
  if (data.request !== request) return
  if (data.type === "error") setStatus("error", `${data.message} (if this persists, reload the page)`)
  if (data.type === "step") {
    paint(data.pixels)
    setStatus("drawing", `Drawing: step ${data.step} of ${current.steps} …`)
  }
  if (data.type === "done") {
    isDone = true
    $("save").disabled = false
    history.replaceState(null, "", `#${new URLSearchParams(current)}`)
    const what = `${current.count} × ${readable(current.class)}, guidance ${current.guidance}`
    const how = `${current.steps} ${config.solver} steps, seed ${current.seed}`
    setStatus("done", `${notice}${what}, ${how}: ${data.seconds.toFixed(2)} s`)
    notice = ""
  }
}

/** The images as one PNG, four in a row, under a name that holds the settings. */
async function save() {
  if (!isDone) return
  const settings = current
  const canvases = [...$("pictures").children]
  const columns = Math.min(4, canvases.length)
  const scale = Math.max(1, Math.round(192/config.image_size))
  const side = config.image_size*scale
  const sheet = document.createElement("canvas")
  sheet.width = columns*side
  sheet.height = Math.ceil(canvases.length/columns)*side
  const context = sheet.getContext("2d")
  context.imageSmoothingEnabled = false
  for (const [i, canvas] of canvases.entries()) {
    context.drawImage(canvas, (i % columns)*side, Math.floor(i/columns)*side, side, side)
  }
  const blob = await new Promise(resolve => sheet.toBlob(resolve))
  const link = document.createElement("a")
  link.href = URL.createObjectURL(blob)
  link.download = `${config.run}_${settings.class}_seed${settings.seed}_cfg${settings.guidance}_`
    + `${config.solver}${settings.steps}_${settings.count}.png`
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10000)
}

/** Start the worker; resolves when the network has passed its self-test, with one thread if several fail. */
function startWorker(threads) {
  return new Promise((resolve, reject) => {
    worker = new Worker(new URL("./worker.js", import.meta.url), {type: "module"})
    const fail = message => {
      worker.terminate()
      if (threads > 1) resolve(startWorker(1))
      else reject(new Error(message))
    }
    worker.onerror = event => fail(event.message || "this browser cannot start the page's worker")
    worker.onmessage = ({data}) => {
      if (data.type === "ready") {
        worker.onmessage = onMessage
        worker.onerror = event => setStatus("error", event.message)
        resolve()
      } else {
        fail(data.message)
      }
    }
    const network = new URL(config.network, document.baseURI).href
    worker.postMessage({type: "load", network, threads, selfTest: config.self_test, size: config.image_size})
  })
}

function connectControls() {
  $("controls").addEventListener("submit", event => {
    event.preventDefault()
    draw()
  })
  for (const id of IDS) {
    $(id).addEventListener("input", () => {
      showValues()
      draw()
    })
  }
  $("another").addEventListener("click", () => {
    $("seed").value = Math.floor(Math.random()*2**32)
    draw()
  })
  $("save").addEventListener("click", save)
  addEventListener("hashchange", openAddress)
}

/** Draw what the address of the page asks for; the rest as page.json has it. */
function openAddress() {
  writeControls(config.settings)
  const refused = writeControls(Object.fromEntries(new URLSearchParams(location.hash.slice(1))))
  notice = refused.length ? `The address asks for ${refused.join(", ")}, which cannot be had here. ` : ""
  draw()
}

async function start() {
  if (typeof WebAssembly !== "object") {
    throw new Error("This browser has no WebAssembly, or it is switched off: try a current browser")
  }
  const answer = await fetch("page.json", {cache: "no-cache"})
  if (!answer.ok) throw new Error(`page.json: ${answer.status} ${answer.statusText}`)
  config = await answer.json()
  document.title = `${config.run}: tinycats in your browser`
  $("about").textContent = config.about
  $("licence").textContent = config.licence
  for (const id of ["guidance", "steps"]) $(id).max = Math.max($(id).max, config.settings[id])
  for (const name of config.classes) $("class").append(new Option(readable(name), name))
  const threads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1
  await startWorker(threads)
  connectControls()
  openAddress()
}

start().catch(error => setStatus("error", error.message))
