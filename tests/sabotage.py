"""Break the book on purpose, one idea at a time: `make sabotage`, or with words of a title, `make sabotage args=unpatchify`.

A test that cannot fail proves nothing. Each row below changes the text of exported code in a copy of the repository, exports, and
runs the named notebook (or pytest file). It has to fail, in the very assertion that is named. First, all of them have to
pass as they are."""
import json, os, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONLY = ("nbs", "tinycats", "tests", "settings.ini", "setup.py", "README.md", "constraints.txt")

# what is broken | where | {text as it is: text as sabotaged} | who has to notice | in which assertion
TABLE = [
    ("breeds follow the order of the files", "00_data", {"for name, _, species, _ in lists[split]]": "for name, _, species, _ in sorted(lists[split])]"},
     "00_data", '["Siamese", "Other", "Bengal", "Other", "Maine_Coon"]'),
    ("near-duplicates of test pictures are trained on", "00_data", {'twins or heads or split == "test" or name not in _TWINS': "True"},
     "00_data", '["Siamese", "Other", "Bengal", "Other", "Maine_Coon"]'),
    ("a broken download goes unnoticed", "00_data", {'if f"{name}.jpg" not in there]': "if False]"},
     "00_data", "pictures of trainval are missing"),
    ("a batch depends on the seed alone", "00_data", {"_uniform((batch_size, 4), self.seed, step, 1, **here)": "_uniform((batch_size, 4), self.seed, 1, **here)",
                                                       "_uniform(count.shape, self.seed, step, 0, **here)": "_uniform(count.shape, self.seed, 0, **here)"},
     "00_data", "cats.batch(8, 52)[0])"),
    ("breeds are drawn as often as they occur", "00_data", {"which = self.order[start[turn] + (pick*count[turn]).long()]": "which = (pick*len(self)).long()"},
     "00_data", "{3, 4}"),
    ("all pets first is breeds first", "00_data", {"if step >= self.balanced_from else": "if True else"}, "00_data", "30 < (of == 10).sum() < 90"),
    ("the network is told of a change that was not made", "00_data", {"return _changed(x1, told), y, told": "return x1, y, told"}, "00_data", "_changed(same.batch(5, 2000)[0], told)"),
    ("pictures are tilted the other way round", "00_data", {"[wide*cos, -high*sin, right, wide*sin, high*cos, down]": "[wide*cos, high*sin, right, -wide*sin, high*cos, down]"},
     "00_data", "big.rot90(1, (2, 3))"),
    ("real pictures to judge by are cut from a corner", "00_data", {"m = (size*9//8 - size)//2": "m = 0"}, "00_data", "uncut[0][..., 2:34, 2:34]"),
    ("what a picture was changed by is not heard", "01_dit", {"if augment is not None: c = c + self.augment(augment)": "pass"}, "01_dit", "apart(told(x1, t, y, torch.rand(4, 5)), out)"),
    ("eyes remember the first picture for ever", "07_metrics", {"key = tuple(pictures.shape), hashlib.sha256(pictures.cpu().contiguous().numpy()).digest()": "key = len(pictures)"},
     "07_metrics", 'features(load_features(f"{folder}/eyes.py:load", "2"), some)'),
    ("unpatchify is scrambled", "01_dit", {"permute(0, 5, 1, 3, 2, 4)": "permute(0, 5, 1, 4, 2, 3)"},
     "01_dit", "unpatchify(patchify(x1, p), p), x1"),
    ("tokens are read column by column", "01_dit", {"permute(0, 2, 4, 3, 5, 1)": "permute(0, 4, 2, 3, 5, 1)",
                                                    "permute(0, 5, 1, 3, 2, 4)": "permute(0, 5, 2, 3, 1, 4)"},
     "01_dit", "unpatchify(tokens[:, [1]], 16)"),
    ("the positions are dropped", "01_dit", {"self.embed(patchify(xt, self.patch_size)) + self.positions": "self.embed(patchify(xt, self.patch_size))"},
     "01_dit", "apart(net(shuffled(x1), t, y), shuffled(out))"),
    ("the positions whisper", "01_dit", {"return torch.cat([rows, cols], dim=-1)": "return .02*torch.cat([rows, cols], dim=-1)"},
     "01_dit", "pos.square().mean()"),
    ("the network does not hear the time", "01_dit", {"c = self.time(time_features(t)) + self.breed(y)": "c = self.breed(y)"},
     "01_dit", "apart(net(x1, t + .2, y), out)"),
    ("the network does not hear the breed", "01_dit", {"c = self.time(time_features(t)) + self.breed(y)": "c = self.time(time_features(t))"},
     "01_dit", "apart(net(x1, t, y + 1), out)"),
    ("the gates begin open", "01_dit", {"for layer in (self.modulation, self.out, *": "for layer in (self.out, *"},
     "01_dit", "torch.equal(*seen)"),
    ("a network begins by caring how pictures were changed", "01_dit", {"*[self.augment]*bool(augment_dim)": "*[]"}, "01_dit", "not told.augment.weight.any()"),
    ("dropout does nothing", "01_dit", {"F.dropout(x, self.dropout, self.training)": "x"},
     "01_dit", "not torch.equal(block(x, c), block(x, c))"),
    ("attention looks at everything alike", "01_dit", {".softmax(dim=-1) @ v": ".mul(0).softmax(dim=-1) @ v"},
     "01_dit", "F.scaled_dot_product_attention(q, k, v), rtol"),
    ("the velocity network says its velocity", "01_dit", {'return out if self.prediction == "clean" else': 'return out if True else'},
     "01_dit", "assert_close(vel(x1, t, y)"),
    ("noise is the target", "02_flow", {"t, y, *told).float() - x1.float()": "t, y, *told).float() - x0.float()"},
     "02_flow", "flow_loss(oracle, x1, y, x0, at(s)).max() == 0"),
    ("the road runs backwards", "02_flow", {"torch.lerp(x0, x1, t.view": "torch.lerp(x1, x0, t.view"},
     "02_flow", "interpolate(x0, x1, 0*ones), x0"),
    ("labels are never dropped", "02_flow", {"return torch.where(torch.rand(len(y), device=y.device) < p, null_class, y)": "return y"},
     "02_flow", "drop_labels(y, 1.) == 13"),
    ("guidance pushes away from the breed", "02_flow", {"torch.lerp(null, cond, cfg_scale)": "torch.lerp(cond, null, cfg_scale)"},
     "02_flow", "guide(a, b, 0), a"),
    ("the null breed is an Abyssinian", "02_flow", {"torch.full_like(y, null_class)": "torch.zeros_like(y)"},
     "02_flow", "end(cfg_scale=0) == -1"),
    ("the sampler divides by the loss's floor", "02_flow", {"yield ask(x, 1 - 1/num_steps, y)":
        "yield x + velocity(ask(x, 1 - 1/num_steps, y), x, torch.full((1,), 1 - 1/num_steps), .05) / num_steps"},
     "02_flow", "torch.equal(sample(knows"),
    ("the average does not warm up", "03_ema", {"return min(decay, (1 + n) / (10 + n))": "return decay"},
     "03_ema", "decay_at(0, .9999) == .1"),
    ("the average is the raw weights", "03_ema", {"1 - decay_at(self.n, d) if self.n else 1.": "1."},
     "03_ema", "rtol=1e-4, atol=1e-5"),
    ("a seal is not looked at", "04_checkpoint", {"if raw[-_SEAL:] != _seal(memoryview(raw)[:-_SEAL]):": "if False:"},
     "04_checkpoint", 'set(seen["load"]) == {2}'),
    ("an unfinished file is left behind", "04_checkpoint", {"finally: part.unlink(missing_ok=True)": "finally: pass"},
     "04_checkpoint", 'os.listdir(note.parent) == ["note"]'),
    ("the last good checkpoint is removed", "04_checkpoint", {"if s != good and not (keep_every": "if not (keep_every"},
     "04_checkpoint", "list(steps(folder)) == [180, 170, 150]"),
    ("labels are never dropped in training", "05_trainer", {'y = drop_labels(y, self.label_drop, getattr(self.model, "num_classes", 13))': ""},
     "05_trainer", "(torch.cat(seen) == 13)"),
    ("raw weights are saved as the average", "05_trainer", {"self.ema.update(self.model)": "[m.module.load_state_dict(self.model.state_dict()) for m in self.ema.models.values()]"},
     "05_trainer", "apart(averages[0]"),
    ("a resumed run forgets its optimizer", "05_trainer", {'for name in ("model", "ema", "optimizer"): getattr': 'for name in ("model", "ema"): getattr'},
     "05_trainer", "course(again) == course(records)"),
    ("a step without a finite gradient is taken", "05_trainer", {"self.optimizer.found_inf = bad.float()": "pass"},
     "05_trainer", "zip(before,"),
    ("the device is asked in every step", "05_trainer", {"self.bad = (self.bad + 1) * bad": "self.bad = (self.bad + 1) * bad; self.check()"},
     "tests/test_fast.py::test_a_step_asks_the_device_nothing", "not q.asked"),
    ("held-out heads are trained on", "00_data", {'and _held_out(name) == (split == "test"))': ")"},
     "00_data", "for n in some]"),
    ("a resumed run may have other settings", "05_trainer", {"if theirs.get(k, v) != v and k not in changes:": "if False:"},
     "05_trainer", 'refused(ValueError, "steps is 50"'),
    ("an orphan is not told", "05_trainer", {"if pollers: threading.Thread(": "if False: threading.Thread("},
     "05_trainer", "assert told == [signal.SIGTERM]"),
    ("an orphan is ended at once", "05_trainer", {"for t in pollers: t.parent_pid = _Anyone(1)": "pass"},
     "05_trainer", "1 != poller.parent_pid"),
    ("an orphan is ended at once, seen from outside", "05_trainer", {"for t in pollers: t.parent_pid = _Anyone(1)": "pass"},
     "tests/test_runs.py::test_a_slow_save_is_finished", "test_a_slow_save_is_finished"),
    ("a long step is never given up", "05_trainer", {"if self.told: raise _GivenUp": "pass"},
     "tests/test_runs.py::test_a_long_step_is_given_up", "DID NOT RAISE"),
    ("a checkpoint changes while it is written", "05_trainer", {'state.detach().to("cpu", copy=True)': "state.detach()"},
     "05_trainer", 'copied["a"].sum() == 0'),
    ("training waits for the disk", "05_trainer", {"self.writing = self.writer.submit(self.write, self.step, snapshot(state))": "self.writing = self.writer.submit(self.write, self.step, snapshot(state)); self.writing.exception()"},
     "05_trainer", "max(steps_meanwhile[:3]) > 0"),
    ("half a line stays in the records", "05_trainer", {"f.truncate(end)": "pass"},
     "05_trainer", "file.read_text() == whole"),
    ("a full disk stops every run", "05_trainer", {'self.if_disk_full == "stop" or e.errno': "True or e.errno"},
     "05_trainer", 'if_disk_full="go on")) == course(records)'),
    ("a misspelt parameter is let through", "10_params", {"if name not in declared: raise ParameterError(_unknown(name, given[name], declared))": "pass"},
     "10_params", "not refused"),
    ("half a step is rounded down", "10_params", {"return kind(value) if kind(value) == value else _no(value)": "return kind(value)"},
     "10_params", "not refused"),
    ("the parameters papermill wrote are not looked at", "10_params", {"check_params({name: namespace[name] for name in names}, declared)": "check_params({}, declared)"},
     "tests/test_params.py", "test_refused_in_one_line"),
    ("an attempt does not know its predecessor", "04_checkpoint", {'and (locked or "TINYCATS_OWNER" in os.environ)': "and locked"},
     "04_checkpoint", 'left(folder, 5, "call 7"); assert admitted(folder)'),
    ("what cannot work is tried again and again", "09_cloud", {"if error and error[0] not in HOPELESS:": "if error:"},
     "09_cloud", 'found[:3] == [["returned", None]'),
    ("a run that is not drawn yet passes for complete", "09_cloud", {' and "wall_seconds" in facts': ""},
     "09_cloud", "not holds(step=7)"),
    ("any GPU will do", "09_cloud", {"if plan.gpu not in (None, *GPUS):": "if False:"},
     "09_cloud", "not refused"),
    ("the backward pass is free", "09_cloud", {"return 3 * tokens * dim": "return tokens * dim"},
     "09_cloud", "flop_per_picture(**size) / counted("),
    ("the distance forgets the means", "07_metrics", {"max(0., (move + a.": "max(0., (0*move + a."},
     "07_metrics", "(9 + 1 + 1)"),
    ("a picture is compared with itself", "07_metrics", {"own = sum((k.sum() - k.trace()) / (m*(m - 1))": "own = sum(k.sum() / m**2"},
     "07_metrics", "values.std()/200**.5"),
    ("a mirrored copy is no copy", "07_metrics", {"for x in (ours, ours.flip(-1))))": "for x in (ours, ours)))"},
     "07_metrics", "rate(thief)"),
    ("a dimmed copy is no copy", "07_metrics", {"F.normalize((small - small.mean((2, 3), keepdim=True)).flatten(1))": "F.normalize(small.flatten(1))"},
     "07_metrics", "rate(thief)"),
    ("floors have other breeds", "07_metrics", {"order[labels[order] == b][:n]": "order[:n]"},
     "07_metrics", "torch.equal(of[chosen], like)"),
    ("the training pictures are the judge", "07_metrics", {'(("heldout", "training", ""), ("training", "heldout", "_train"))': '(("training", "heldout", ""), ("heldout", "training", "_train"))'},
     "07_metrics", 'thieves["fd_gap"]'),
    ("every picture is its own neighbour", "07_metrics", {".fill_diagonal_(math.inf).kthvalue(k)": ".kthvalue(k)"},
     "07_metrics", "p1 > .9 and r1 < .2"),
    ("a newer wish does not end the older", "08_explorer", {"if self.painter.newer and (self.first or now - self.begun > self.fair): raise _Newer": "pass"},
     "tests/test_explorer.py", "test_a_newer_wish_ends_the_older"),
    ("overtaken wishes are drawn all the same", "08_explorer", {"            else: self.wish = wish\n": "            else: self.wish = (lambda old, new: lambda: (old and old(), new()))(self.wish, wish)\n"},
     "08_explorer", 'seen == ["first", 4, "saved"]'),
    ("noise is mixed along the straight line", "08_explorer", {"if angle < 1e-4: return": "if True: return"},
     "08_explorer", "slerp(a, b, s).std()"),
    ("mixed breeds run the wrong way", "08_explorer", {"torch.lerp(table[a], table[b], float(s))": "torch.lerp(table[b], table[a], float(s))"},
     "08_explorer", "frames[[0, -1]]"),
    ("being watched moves the end of the interval", "08_explorer", {"now = round(t[0].item()*num_steps) / num_steps ": "now = t[0].item() "},
     "08_explorer", "times == [i/9"),
    ("a wish is given up before it showed anything", "08_explorer", {"fair, pause = .15, .2": "fair, pause = 0., .2"},
     "tests/test_explorer.py", "test_every_wish_shows_something"),
    ("there is no draft", "08_explorer", {'[DRAFT]*bool(told and s["num_steps"] > 2*DRAFT)': "[]"},
     "tests/test_explorer.py", "test_the_draft_comes_first"),
    ("raw weights are drawn from other noise", "08_explorer", {'x0, dtype = seeded_noise(s["n"], model.image_size, s["seed"])': 'x0, dtype = seeded_noise(s["n"], model.image_size, s["seed"] + len(pictures))'},
     "08_explorer", 'draw_settings(settings)["raw"], drawn["raw"]'),
    ("a picture forgets how it was made", "08_explorer", {'info.add_text("tinycats", json.dumps(s))': "pass"},
     "08_explorer", "== save_picture("),
    ("names from outside are put on the page as they are", "08_explorer", {"<b>{heading}</b> {html.escape(words)}": "<b>{heading}</b> {words}"},
     "tests/test_explorer.py", "test_a_picture_is_saved"),
]


def copy(there):
    "A working copy of the repository, without its history, environment and runs."
    for name in ONLY:
        skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, there/name, **({"ignore": skip} if (ROOT/name).is_dir() else {}))
    (there/"outputs").mkdir()
    for name in ("outputs/toy", "data"):
        if (ROOT/name).exists(): (there/name).symlink_to(ROOT/name)


def patch(path, changes):
    "Change exported code; every text must be there exactly once, so that a sabotage that has gone stale is noticed."
    nb = json.loads(path.read_text(encoding="utf-8"))
    exported = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| export")]
    for old, new in changes.items():
        at = [c for c in exported if old in "".join(c["source"])]
        if len(at) != 1 or "".join(at[0]["source"]).count(old) != 1:
            return f"{path.name} has {sum(''.join(c['source']).count(old) for c in exported)} times, not once: {old}"
        at[0]["source"] = "".join(at[0]["source"]).replace(old, new).splitlines(True)
    path.write_text(json.dumps(nb), encoding="utf-8")


def run(there, *command):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(there), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], cwd=there, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def check(there, who):
    "Run the notebook or test file that has to notice."
    if who.startswith("tests/"): return run(there, "-m", "pytest", "-q", "-p", "no:cacheprovider", who)
    return run(there, str(Path(sys.executable).with_name("nbdev_test")), "--path", f"nbs/{who}.ipynb")


def attempt(title, where, changes, who, assertion):
    "None where the sabotage is noticed as it should be, otherwise what went wrong."
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        copy(there)
        if missing := next((n for n in (where, who) if n and "/" not in n and not (there/"nbs"/f"{n}.ipynb").exists()), None):
            return f"there is no nbs/{missing}.ipynb yet"
        if where:
            if stale := patch(there/"nbs"/f"{where}.ipynb", changes): return stale
            code, said = run(there, str(Path(sys.executable).with_name("nbdev_export")))
            if code: return f"does not export:\n{said}"
        code, said = check(there, who)
    if not where: return said if code else None
    if not code: return f"{who} passes and does not notice"
    return None if assertion in said else f"{who} fails, but not in `{assertion}`:\n{said[-3000:]}"


def main(words):
    rows = [r for r in TABLE if not words or any(w in r[0] or w in r[1] for w in words)]
    as_they_are = [(f"{who} as it is", None, None, who, None) for who in dict.fromkeys(r[3] for r in rows)]
    wrong, start, broken = 0, time.time(), set()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for batch in (as_they_are, rows):   # a test that fails as it is notices nothing, so those come first
            attempts = pool.map(lambda r: f"{r[3]} fails as it is" if r[3] in broken else attempt(*r), batch)
            for row, problem in zip(batch, attempts):
                if row[1] is None and problem: broken.add(row[3])
                told = "passes" if row[1] is None else f"noticed by {row[3]}"
                print(f"{'WRONG' if problem else 'ok':6}{row[0]}: {problem or told}", flush=True)
                wrong += bool(problem)
    print(f"{len(rows)} sabotages in {time.time() - start:.0f} s, {wrong} wrong" if wrong else
          f"All {len(rows)} sabotages were noticed ({time.time() - start:.0f} s).")
    return bool(wrong or not rows)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
