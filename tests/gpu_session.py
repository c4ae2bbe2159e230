"""What to do with half an hour of a GPU, in three commands; a machine with PyTorch alone is enough:

    python tests/gpu_session.py check --data DIR            # 3 minutes: tests on the GPU, benchmarks
    python tests/gpu_session.py questions --data DIR        # 4 minutes: the ablation at 128 px
    python tests/gpu_session.py train --data DIR --minutes 14

DIR holds oxford-iiit-pet. `train` measures the speed, sets the length so that the cosine ends in time, trains
nbs/params/pets128_patch8.yaml, evaluates it, and writes the averaged weights in bfloat16, in parts of 15 MB,
beside the run; `join --run RUN` puts them together again. With --tiny, to rehearse, all is small."""
import argparse, json, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARAMS = ROOT/"nbs/params"
PART_BYTES = 15*2**20
TINY_NETWORK = ["image_size=16", "patch_size=8", "dim=32", "depth=1", "num_heads=2", "batch_size=8"]


def run_page(name, *words):
    "Run a page with the packages at hand; its figures and text are shown as it goes."
    command = [sys.executable, ROOT/"tests/page.py", ROOT/f"nbs/{name}.ipynb", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True)


def check(options):
    "The tests that need a GPU, then the benchmarks."
    tests = ["tests/test_fast.py", "tests/test_metrics.py", "tests/test_runs.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *tests, "-k", "gpu"], cwd=ROOT)
    small = ["quick=True", "sections=['switches']"] if options.tiny else []
    run_page("bench", f"device={options.device}", *small)


def questions(options):
    "The ablation at 128 px."
    tiny = [*TINY_NETWORK, "steps=6", "warmup_steps=2", "samples=1", "arms=['less noise']"]
    small = tiny if options.tiny else []
    usual = ["-f", PARAMS/"ablation128.yaml", f"data_root={options.data}", f"device={options.device}"]
    run_page("ablation", *usual, *small)


def read_speed(folder):
    "Steps a second in the later half of a run's records: the first contain the compilation."
    records = [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines()]
    speeds = sorted(record["steps_per_s"] for record in records[len(records)//2:])
    return speeds[len(speeds)//2]


def length_for(speed, minutes):
    "Settings whose cosine ends after so many minutes: 60 % of the steps by frequency, then by class."
    steps = max(100, int(speed*minutes*60)//100*100)
    every = max(50, steps//6)
    return [f"steps={steps}", f"balance_from_step={steps*6//10}", f"warmup_steps={max(10, steps//30)}",
            f"checkpoint_every={every}", f"keep_every={every}", f"sample_every={every}"]


def train(options):
    "Measure the speed in a run of its own, train, evaluate, and pack the weights."
    recipe = ["-f", PARAMS/"pets128_patch8.yaml", f"data_root={options.data}", f"device={options.device}"]
    small = [*TINY_NETWORK, "samples=1", "num_steps=2"] if options.tiny else []
    probe = ["run=probe", "steps=200", "log_every=20", "sample_every=0", "checkpoint_every=200"]
    run_page("train", *recipe, *small, *probe, "samples=1", "num_steps=2")
    speed = read_speed(ROOT/"outputs/probe")
    minutes = .2 if options.tiny else options.minutes
    settings = length_for(speed, minutes)
    print(f"{speed:.2f} steps a second: {settings[0]} for {minutes:g} minutes", flush=True)
    run_page("train", *recipe, *small, f"run={options.run}", *settings)
    few = ["samples=1", "batch_size=8", "num_steps=2"] if options.tiny else ["samples=50", "batch_size=200"]
    run_page("evaluate", f"run={options.run}", f"data_root={options.data}", f"device={options.device}", *few)
    pack(ROOT/"outputs"/options.run)


def pack(folder):
    "Write every file of averaged weights in bfloat16 and in parts."
    import torch
    from safetensors import safe_open
    from safetensors.torch import save
    for path in sorted(folder.glob("ema*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).to(torch.bfloat16) for name in file.keys()}
            content = save(tensors, metadata=file.metadata())
        for i, start in enumerate(range(0, len(content), PART_BYTES)):
            (folder/f"{path.stem}.part{i}").write_bytes(content[start:start + PART_BYTES])


def join(options):
    "Put the parts of a run's weights together: <name>.bf16.safetensors, which `load_model` reads."
    folder = ROOT/"outputs"/options.run
    for first in sorted(folder.glob("*.part0")):
        parts = [first.with_suffix(f".part{i}") for i in range(len(list(folder.glob(f"{first.stem}.part*"))))]
        first.with_suffix(".bf16.safetensors").write_bytes(b"".join(part.read_bytes() for part in parts))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("what", choices=["check", "questions", "train", "join"])
    parser.add_argument("--data", default="data", help="the folder that holds oxford-iiit-pet")
    parser.add_argument("--minutes", type=float, default=14, help="of the long training")
    parser.add_argument("--run", default="pets", help="the name of the run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small networks, few steps")
    options = parser.parse_args()
    start = time.monotonic()
    globals()[options.what](options)
    print(f"{options.what}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
