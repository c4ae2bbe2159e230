// Noise and solvers as in tinycats.flow, so that a seed gives the same image here as in Python.

/** The Mersenne Twister (Matsumoto & Nishimura 1998), seeded as torch.Generator().manual_seed(seed) seeds it. */
class MersenneTwister {
  constructor(seed) { // 0 to 2^32 - 1
    this.state = new Uint32Array(624)
    this.state[0] = seed
    for (let i = 1; i < 624; i++) {
      const previous = this.state[i - 1] ^ (this.state[i - 1] >>> 30)
      this.state[i] = Math.imul(1812433253, previous) + i
    }
    this.position = 624
  }

  /** Make the next 624 numbers out of the last. */
  refill() {
    const state = this.state
    for (let i = 0; i < 624; i++) {
      const bits = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff)
      state[i] = state[(i + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0)
    }
    this.position = 0
  }

  /** A whole number of 32 bits. */
  next() {
    if (this.position === 624) this.refill()
    let bits = this.state[this.position++]
    bits ^= bits >>> 11
    bits ^= (bits << 7) & 0x9d2c5680
    bits ^= (bits << 15) & 0xefc60000
    return (bits ^ (bits >>> 18)) >>> 0
  }

  /** A number in [0, 1) of 24 bits, as PyTorch makes float32 numbers. */
  uniform() {
    return (this.next() & 0xffffff)*2**-24
  }
}

/** Turn 16 uniform numbers into normal ones in place: eight radii and eight angles (Box & Muller 1958). */
function makeNormal(values, start) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.sqrt(-2*Math.log(1 - values[i]))
    const angle = 2*Math.PI*values[i + 8]
    values[i] = radius*Math.cos(angle)
    values[i + 8] = radius*Math.sin(angle)
  }
}

/** `seeded_noise(count, size, seed)` of tinycats.flow: count images (3, size, size), one after the other. */
export function seededNoise(count, size, seed) {
  const generator = new MersenneTwister(seed)
  const length = 3*size*size // of an image; at least 16
  const images = new Float32Array(count*length)
  for (let image = 0; image < count; image++) {
    const values = images.subarray(image*length, (image + 1)*length)
    for (let i = 0; i < length; i++) values[i] = generator.uniform()
    for (let i = 0; i + 16 <= length; i += 16) makeNormal(values, i)
    if (length % 16) { // PyTorch draws the last 16 once more
      for (let i = length - 16; i < length; i++) values[i] = generator.uniform()
      makeNormal(values, length - 16)
    }
  }
  return images
}

/**
 * `sample` of tinycats.flow: solve dx/dt = (x_hat - x)/(1 - t) from the noise x0 at t = 0 to the images at t = 1.
 * `predict(x, t)` answers with x_hat; `onStep(xHat, step)` sees each prediction; either may throw to end the sampling.
 */
export async function sample(predict, x0, numSteps, solver, onStep) {
  const x = Float32Array.from(x0)
  const velocity = new Float32Array(x.length) // of the step before
  for (let step = 0; ; step++) {
    const t = step/numSteps
    const xHat = await predict(x, t)
    await onStep(xHat, step + 1)
    if (step + 1 === numSteps) return xHat // the last step lands on the prediction
    const useLast = solver === "ab2" && step > 0 // ab2: extrapolate to the middle of the step
    for (let i = 0; i < x.length; i++) {
      const v = (xHat[i] - x[i])/(1 - t)
      x[i] += (useLast ? v + (v - velocity[i])/2 : v)/numSteps
      velocity[i] = v
    }
  }
}

/** Bytes (count*size*size*4, as a canvas takes them) of images in [-1, 1], colour planes (count, 3, size, size). */
export function toPixels(images, count, size) {
  const area = size*size
  const pixels = new Uint8ClampedArray(count*area*4) // rounds and clamps as `to_uint8` of tinycats.core does
  for (let image = 0; image < count; image++) {
    for (let i = 0; i < area; i++) {
      for (let colour = 0; colour < 3; colour++) {
        pixels[(image*area + i)*4 + colour] = (images[(image*3 + colour)*area + i] + 1)*127.5
      }
      pixels[(image*area + i)*4 + 3] = 255
    }
  }
  return pixels
}
