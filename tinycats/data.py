#| export
import hashlib, math, os, torch
from pathlib import Path
from types import SimpleNamespace
from torch import Tensor

BREEDS = ["Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau", "Maine_Coon", "Persian",
          "Ragdoll", "Russian_Blue", "Siamese", "Sphynx", "Other"]

def to_float(u8): return u8.to(torch.float32)/127.5 - 1
def to_uint8(x): return ((x.float().clamp(-1, 1) + 1)*127.5).round().to(torch.uint8)

_M = 2**64 - 1
def _mix(z):
    "SplitMix64's finaliser on a 64-bit integer"
    z = (z ^ z >> 30)*0xBF58476D1CE4E5B9 & _M
    z = (z ^ z >> 27)*0x94D049BB133111EB & _M
    return z ^ z >> 31
def _signed(z): return z - 2**64 if z >= 2**63 else z

def _uniform(shape, *key):
    state = 0
    for k in key: state = _mix(state + 0x9E3779B97F4A7C15 + int(k) & _M)
    z = torch.arange(1, math.prod(shape) + 1)*_signed(0x9E3779B97F4A7C15) + _signed(state)
    for s, m in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB):
        z = (z ^ (z >> s & 2**(64 - s) - 1))*_signed(m)
    z = z ^ (z >> 31 & 2**33 - 1)
    return ((z >> 11 & 2**53 - 1).double()*2**-53).view(shape)

_TABLE = """
breed              coat    marks   pale    eyes    inner   nose    pattern   head  high  taper  ear   wide  body  fluff eye
Abyssinian         c9803f  8a4a20  edc08c  b9b23a  e3a689  a8513f  ticked    0.37  0.36  0.30   0.36  0.20  0.88  0.00  1.05
Bengal             e0a04a  4a2813  f6ddb0  8fae3c  d99a7c  8d4a3c  rosettes  0.39  0.36  0.10   0.24  0.17  1.00  0.00  1.00
Birman             efe0c8  5c4536  fbf6ec  3f7fd0  cfa08c  6b4a45  gloves    0.42  0.38  0.00   0.24  0.18  1.12  0.030 1.05
Bombay             2b2730  17141a  3a353f  e08a1e  5c4450  1a161c  solid     0.40  0.38  0.00   0.25  0.18  0.98  0.00  1.10
British_Shorthair  7f8c9d  6a7688  93a0b0  ee8a1c  a88f94  4c5562  solid     0.47  0.42 -0.22   0.17  0.17  1.18  0.00  1.10
Egyptian_Mau       bfc1c4  3b3c42  e6e7e8  86c23f  cfa6a4  9c5a54  spots     0.38  0.36  0.20   0.28  0.18  0.92  0.00  1.15
Maine_Coon         9a6b40  3a2415  ecd7b4  b8a23c  cf9a80  9a4f44  stripes   0.42  0.41 -0.05   0.38  0.19  1.18  0.035 0.92
Persian            f7ecdb  e6d3b8  fffaf2  d9761e  e7b9a6  c9736a  flat      0.50  0.41 -0.30   0.14  0.16  1.25  0.045 1.15
Ragdoll            f3efea  82797c  ffffff  4a90dc  d8aaa4  c77f7c  mitted    0.43  0.39 -0.05   0.22  0.18  1.15  0.030 1.00
Russian_Blue       74869e  5c6c84  8595ab  3fbf58  a58a98  46505f  solid     0.36  0.36  0.40   0.34  0.19  0.84  0.00  1.00
Siamese            f0e0c4  3a281f  f7ecd8  3a86e0  5a4038  2c1d18  points    0.35  0.37  0.50   0.36  0.21  0.82  0.00  0.95
Sphynx             e9b5a2  c98674  f3cbbb  d8cf3e  dd8f80  c4756a  wrinkles  0.36  0.37  0.40   0.46  0.25  0.86  0.00  1.15
Other              a9713f  6b3f20  f2e0c0  4a2c18  6b3f20  231a18  dog       0.41  0.40  0.05   0.42  0.17  1.05  0.00  0.90
"""

def _traits():
    head, *rows = [row.split() for row in _TABLE.strip().split("\n")]
    value = lambda k, v: v if k in ("breed", "pattern") else _rgb(v) if k in head[1:7] else float(v)
    return [SimpleNamespace(**{k: value(k, v) for k, v in zip(head, row)}) for row in rows]

def _rgb(code): return torch.tensor([int(code[i:i+2], 16)/255 for i in (0, 2, 4)]).view(3, 1, 1)

_POSE = dict(x=(-.14, .14), y=(-.05, .05), scale=(.84, 1.0), tilt=(-.16, .16), turn=(-.07, .07), nod=(-.03, .03), lift=(-.03, .03),
             tail=(-1, 1), curl=(-.5, .35), open=(.72, 1.), pupil=(.22, .6), gaze=(-.25, .25), side=(-1, 1), light=(.93, 1.06),
             warm=(-.04, .04), hue=(0, 1), contrast=(.0, 1.), phase=(0, 1), lean=(-.1, .1), shade=(-.04, .04))

def _wave(x):
    "A sine made of parabolas, period 1, in [-1, 1]; only exact arithmetic, so that every machine agrees"
    x = (x - x.floor()).mul_(2).sub_(1)
    return x.abs().sub_(1).mul_(x).mul_(4)
def _disc(x, y, rx, ry):
    "Distance to an ellipse around 0, right near its edge"
    small = min(rx, ry) if isinstance(ry, float) else ry
    return ((x/rx)**2 + (y/ry)**2).sub_(1).mul_(.5*small)
def _smin(a, b, k):
    "The smaller of two distances with the corner between them rounded over a width k"
    h = (a - b).abs_().neg_().add_(k).clamp_(min=0)
    return torch.minimum(a, b).sub_(h.square_().mul_(.25/k))
def _line(x, y, a, b, r):
    "Distance to a capsule from a to b"
    (ax, ay), (bx, by) = a, b
    dx, dy = bx - ax, by - ay
    k = (((x - ax)*dx + (y - ay)*dy)/(dx*dx + dy*dy)).clamp_(0, 1)
    return ((x - ax - k*dx).square_() + (y - ay - k*dy).square_()).sqrt_().sub_(r)
def _arc(x, y, radius, angle, width):
    y = y.abs(); c, s = math.cos(angle), math.sin(angle)
    ring = ((x*x + y*y).sqrt_() - radius).abs_()
    end = ((x - radius*c).square_() + (y - radius*s).square_()).sqrt_()
    return torch.where(y*c <= x*s, ring, end) - width
def _triangle(x, y, a, b, c, k):
    "Distance to a triangle (anticlockwise), corners rounded over k"
    d = None
    for (px, py), (qx, qy) in (a, b), (b, c), (c, a):
        n = math.hypot(qx - px, qy - py)
        e = x*((qy - py)/n) + (y*((px - qx)/n) - (px*(qy - py) - py*(qx - px))/n)
        d = e if d is None else -_smin(-d, -e, k)
    return d

def _spots(x, y, size, phase):
    "Distance from the nearest point of a hexagonal lattice"
    v = y/(size*.866); row = v.round()
    u = x/size + .5*row + phase
    u = u - u.round(); v = (v - row)*.866
    return (u*u + v*v).sqrt_().mul_(size)

def _cover(c, d, soft=1.): return (.5 - d/(c.px*soft)).clamp_(0, 1)
def _paint(c, cover, colour): c.pic[:, :3].lerp_(colour, cover)
def _fur(c, d, colour, light, soft=1., rim=.30):
    cover = _cover(c, d, soft)
    edge = (d/.13).add_(1).clamp_(0, 1).square_().mul_(-rim).add_(1)
    c.pic[:, :3].lerp_(colour, cover)
    c.pic[:, 3:].lerp_(edge.mul_(light), cover)
    return cover

def _background(c):
    p, hue = c.p, c.p.hue
    tint = lambda h, s, v: torch.cat([v - s*(1 + torch.cos(6.2832*(h + k)))*.5 for k in (0, 1/3, 2/3)], 1)
    wall, floor = tint(hue, .26, .95), tint(hue + .12 + .2*p.contrast, .34, .86)
    c.pic[:, :3] = wall
    glow = ((c.x/1.15)**2 + ((c.y - .1)/1.15)**2).neg_().add_(1).clamp_(0, 1)
    c.pic[:, :3].lerp_(torch.ones(3, 1, 1), glow.mul_(.45))
    c.pic[:, :3].lerp_(floor, _cover(c, c.Y + .42, 5.))
    c.pic[:, 3:] = 1 + .10*c.side*c.X + .05*c.Y
    shadow = (((c.x + .16*c.side)/.78)**2 + ((c.y + .80)/.15)**2).neg_().add_(1).clamp_(0, 1)
    c.pic[:, 3:].mul_(1 - .45*shadow)

def _tail(c):
    t, p = c.t, c.p
    x, y = c.flip*c.x - .42, c.y + .38
    co, si = p.curl.cos(), p.curl.sin()
    u, v = x*co + y*si, y*co - x*si
    wide = .075 + 1.6*t.fluff if t.pattern != "wrinkles" else .045
    d = _arc(u, v, .30, 1.9 if t.pattern != "dog" else 1.2, wide)
    if t.fluff: d = d + t.fluff*.5*_wave(4*(x + y))
    dark = t.pattern in ("points", "gloves", "mitted")
    cover = _fur(c, d, t.marks if dark else c.coat, c.light, 1 + 40*t.fluff)
    if t.pattern in ("stripes", "rosettes", "spots", "ticked"):
        ring = (_wave(3.2*(c.y + .3*x)) - .1).mul_(5 if t.pattern != "ticked" else 1).clamp_(0, 1)
        _paint(c, cover*ring.maximum(_cover(c, .17 - y, 3.)), t.marks)

def _body(c):
    t, w = c.t, c.t.body
    chest = _disc(c.x, c.y + .28, .27*w, .46)
    hips = _disc(c.x, c.y + .56, .40*w, .27)
    d = _smin(chest, hips, .15)
    if t.fluff: d = d + t.fluff*_wave(3.5*c.y + 2.*c.ax)
    c.torso = _fur(c, d, c.coat, c.light, 1 + 40*t.fluff)
    feet = _disc(c.ax - .33*w, c.y + .75, .16, .085)
    dark = t.pattern in ("points",)
    _fur(c, feet, t.marks if dark else c.pale if t.pattern in ("gloves", "mitted") else c.coat, c.light)

def _coat(c):
    t, side = c.t, c.ax
    if t.pattern == "stripes":
        m = (_wave(3.6*c.y - 1.6*c.ax + .3*c.p.phase) - .05).mul_(4).clamp_(0, 1)
        _paint(c, m*c.torso*((c.ax - .10)*9).clamp(0, 1), t.marks)
    if t.pattern in ("spots", "rosettes"):
        d = _spots(c.x + .0*c.y, c.y, .17 if t.pattern == "spots" else .21, c.p.phase)
        if t.pattern == "rosettes": d = (d - .052).abs_() + .026
        _paint(c, _cover(c, d - .05, 1.2)*c.torso, t.marks)
    if t.pattern == "ticked": _paint(c, c.torso*(.55*((c.ax - .12)*4).clamp(0, 1)), t.marks)
    if t.pattern == "wrinkles":
        m = (_wave(5.*c.y + 1.2*c.ax*c.ax) - .55).mul_(2).clamp_(0, 1)
        _paint(c, m*c.torso*.6, t.marks)
    if t.pattern in ("stripes", "dog", "ticked", "rosettes", "flat", "mitted", "gloves"):
        bib = _disc(c.x, c.y + .25, .19*t.body, .32)
        if t.fluff: bib = bib + .04*_wave(5*c.ax - 3*c.y)
        _paint(c, _cover(c, bib, 6.)*c.torso, c.pale)

def _legs(c):
    t = c.t
    d = _line(c.ax, c.y, (.125*t.body, -.35), (.135*t.body, -.72), .085 + .5*t.fluff)
    foot = _disc(c.ax - .135*t.body, c.y + .765, .118, .075)
    d = _smin(d, foot, .06)
    top = ((-.30 - c.y)*5).clamp(0, 1)
    cover = _cover(c, d)*top
    edge = (d/.09).add_(1).clamp_(0, 1).square_().mul_(-.34).add_(1)
    c.pic[:, :3].lerp_(c.coat, cover)
    if t.pattern in ("rosettes", "spots", "stripes"):
        bar = (_wave(4.6*c.y + .2) - .1).mul_(4).clamp_(0, 1)
        _paint(c, cover*bar, t.marks)
    if t.pattern in ("points", "gloves", "mitted"):
        _paint(c, cover*((-.45 - c.y)*5).clamp(0, 1), t.marks)
    if t.pattern in ("gloves", "mitted", "dog", "stripes"): _paint(c, cover*((-.66 - c.y)*14).clamp(0, 1), c.pale)
    c.pic[:, 3:].lerp_(edge.mul_(c.light), cover)

def _ears(c):
    t = c.t
    x, y, w, h = c.hax, c.hy, t.head, t.high
    if t.pattern == "dog":
        d = _disc(x - .93*w + .3*(y + .05), y + .08, .125, .34)
        _fur(c, d, t.marks, c.hlight); return
    a, b = (.16*w, .60*h), (.98*w, .10*h)
    m = ((a[0] + b[0])*.5, (a[1] + b[1])*.5)
    n = (b[1] - a[1], a[0] - b[0]); k = math.hypot(*n)
    out = .62 + .25*(t.ear > .33)
    tip = (m[0] + t.wide*.55*out, h*.80 + t.ear)
    d = _triangle(x, y, a, b, tip, .07)
    dark = t.pattern in ("points", "gloves", "mitted")
    _fur(c, d, t.marks if dark else c.coat, c.hlight, 1 + 10*t.fluff)
    _paint(c, _cover(c, d + .058, 2.)*.9, t.inner)
    if t.pattern == "stripes": 
        _paint(c, _cover(c, _line(x, y, tip, (tip[0] + .03, tip[1] + .07), .012), 2.), t.marks)

def _head(c):
    t = c.t
    xw = c.hx*(1 - t.taper*c.hy)
    d = _disc(xw, c.hy, t.head, t.high)
    if t.fluff: d = d + t.fluff*1.1*_wave(3*c.hy - 2.4*c.hax)*(c.hax*3 - .4).clamp(0, 1)
    _fur(c, d + .02, c.coat, c.hlight, 1 + 40*t.fluff)
    c.skull = _cover(c, d + .02, 1 + 40*t.fluff)

def _mask(c):
    t = c.t; x, y = c.fax, c.hy
    if t.pattern == "points":
        d = _disc(c.fx, y + .06, .27, .31)
        _paint(c, (.55 - d/.22).clamp_(0, 1)*c.skull*.93, t.marks)
    if t.pattern == "gloves":
        d = _disc(c.fx, y + .05, .30, .27)
        _paint(c, (.5 - d/.2).clamp_(0, 1)*c.skull*.8, t.marks)
    if t.pattern == "mitted":
        v = (x - .05 - .55*(.16 - y))
        _paint(c, _cover(c, -v, 3.)*c.skull*_cover(c, -.17 - y, 6.), t.marks)
    if t.pattern in ("stripes", "rosettes", "spots", "ticked"):
        m = (_wave(9*x + .25) - .15).mul_(3).clamp_(0, 1)*((y - .13)*9).clamp(0, 1)*((.26 - x)*12).clamp(0, 1)
        side = (_wave(6.5*y + 2*x + .3) - .25).mul_(3).clamp_(0, 1)*((x - .26)*12).clamp(0, 1)*((.12 - y)*9).clamp(0, 1)
        _paint(c, m.maximum(side)*c.skull*(.5 if t.pattern == "ticked" else .95), t.marks)
    if t.pattern == "wrinkles":
        m = (_wave(8*y - 3*x*x) - .35).mul_(2).clamp_(0, 1)*((y - .12)*9).clamp(0, 1)*((.24 - x)*9).clamp(0, 1)
        _paint(c, m*c.skull*.8, t.marks)
    if t.pattern == "dog":
        _paint(c, _cover(c, _disc(c.fx, y - .14, .065, .26), 3.)*c.skull, c.pale)

def _eyes(c):
    t, p = c.t, c.p
    s = t.eye; gap = .17 if t.head < .45 else .20
    u, v = c.fax - gap, c.hy - .03
    v = v - .22*u
    h = (.105*s)*p.open if t.pattern != "dog" else .08
    w = .108*s if t.pattern != "dog" else .075
    q = lambda rx, ry, du=0., dv=0.: _disc(u - du, v - dv, rx, ry)
    _paint(c, _cover(c, q(w + .024, h + .024)), torch.full((3, 1, 1), .12))
    _paint(c, _cover(c, q(w, h)), t.eyes)
    c.pic[:, 3:].lerp_(torch.ones(1), _cover(c, q(w + .024, h + .024)))
    sgn = c.fx.sign()
    g = p.gaze*.16*sgn
    pw = .09*p.pupil + .008 if t.pattern != "dog" else .045
    _paint(c, _cover(c, q(pw, h*.88, g)), torch.full((3, 1, 1), .04))
    du = sgn*c.side*.035
    _paint(c, _cover(c, ((u - g - du)**2 + (v - .035)**2).sqrt() - .026), torch.ones(3, 1, 1))

def _muzzle(c):
    t = c.t; x, y = c.fax, c.hy + .0
    dog = t.pattern == "dog"; low = -.13 if t.pattern != "flat" else -.09
    if dog: _paint(c, _cover(c, _disc(c.fx, y + .17, .20, .16), 2.), c.pale)
    elif t.pattern in ("points", "gloves"): _paint(c, _cover(c, _disc(x - .07, y - low + .04, .11, .08), 4.)*.35, c.coat)
    else: _paint(c, _cover(c, _disc(x - .07, y - low + .04, .115, .085), 3.)*.85, c.pale)
    if dog: _paint(c, _cover(c, _disc(c.fx, y + .29, .055, .085))*_cover(c, y + .225), _rgb("ee7f86"))
    ink = t.nose*.55
    m = (((x - .05)**2 + (y - low + .045)**2).sqrt_() - .05).abs_().maximum(y - low + .05)
    _paint(c, _cover(c, m - .009)*.85, ink)
    n = .058 if not dog else .085
    _paint(c, _cover(c, _triangle(c.fx, y - low, (-n, .035), (0., -.035), (n, .035), .05) - .008*(1 + dog)), t.nose)

def _whiskers(c):
    if c.t.pattern in ("dog", "wrinkles"): return
    r = c.fax - .06
    s = (c.hy + .13)/r.clamp(min=.02)
    near = (s/.24).round().clamp_(-1, 1)*.24
    d = (s - near).abs_().mul_(r) - .006
    reach = _cover(c, r - .40, 6.)*_cover(c, .09 - r, 4.)
    dark = c.t.coat.mean() > .6
    _paint(c, _cover(c, d)*reach*.6, torch.full((3, 1, 1), .35 if dark else .95))

_LAYERS = [_background, _tail, _body, _coat, _legs, _ears, _head, _mask, _muzzle, _eyes, _whiskers]

def _draw(t, u, size, layers=_LAYERS):
    p = SimpleNamespace(**{k: (lo + (hi - lo)*u[:, i]).float().view(-1, 1, 1, 1) for i, (k, (lo, hi)) in enumerate(_POSE.items())})
    g = (torch.arange(size)*2 + 1)/size - 1
    c = SimpleNamespace(t=t, p=p, X=g.view(1, 1, 1, -1), Y=-g.view(1, 1, -1, 1), pic=torch.empty(len(u), 4, size, size))
    c.side, c.flip, c.px = p.side.sign(), p.tail.sign(), 2/size/p.scale
    c.x, c.y = (c.X - p.x)/p.scale, (c.Y - p.y)/p.scale
    c.ax = c.x.abs()
    x, y = c.x - p.lean*.6, c.y - .20 - p.lift
    co, si = p.tilt.cos(), p.tilt.sin()
    c.hx, c.hy = x*co + y*si, y*co - x*si
    c.hax = c.hx.abs(); c.fx = c.hx - p.turn; c.fax = c.fx.abs()
    c.light = p.light*(1 + .20*c.side*c.x + .10*(c.y + .4))
    c.hlight = p.light*(1 + .22*c.side*c.hx + .18*c.hy)
    warm = torch.cat([p.warm, 0*p.warm, -p.warm], 1)
    c.coat, c.pale = (t.coat + warm + p.shade), (t.pale + .5*warm)
    for layer in layers: layer(c)
    return (c.pic[:, :3]*c.pic[:, 3:]).clamp_(0, 1).mul_(255).round_().to(torch.uint8)

def toy_cats(n, size=64, seed=0, breeds=None):
    classes = torch.tensor([BREEDS.index(b) if isinstance(b, str) else int(b) for b in (breeds if breeds is not None else BREEDS)])
    k = len(classes)
    labels = classes[_uniform((-(-n//k), k), seed, 1).argsort(1)].view(-1)[:n]
    dice, traits = _uniform((n, len(_POSE)), seed, 2), _traits()
    pictures = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for y in labels.unique().tolist():
        for i in (labels == y).nonzero()[:, 0].split(max(1, 2**16//size**2)):
            pictures[i] = _draw(traits[y], dice[i], size)
    return pictures, labels

from pathlib import Path
def project_root(): return next((p for p in (Path.cwd(), *Path.cwd().parents) if (p/"settings.ini").exists()), Path.cwd())
class Cats:
    def __init__(self, pictures, labels, size=None, seed=0, flip=True, device="cpu"):
        self.p, self.y, self.seed = pictures.to(device), labels.to(device), seed
        self.num_classes=13
    def __len__(self): return len(self.p)
    def batch(self, step, n):
        g=torch.Generator().manual_seed(self.seed*100003+step)
        r=torch.randint(len(self.p),(n,),generator=g).to(self.p.device)
        return to_float(self.p[r]), self.y[r]
