"""Whether engines read what export.py writes for them: an environment per engine, its own parser, data set and scores.

    python tests/benchmarks/handover.py --folder engines --engine openrlhf --engine trl

Makes `<folder>/env-ENGINE`, which sees the packages of the current environment and adds the engine without its
dependencies (none of them needs a GPU), and small random reward models with three chat templates. Prints one line per
engine and template: what the engine's own code says (handover_probe.py), or why it can't be run. NEMO_RL: a checkout of
NeMo-RL, whose package is empty.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

FAMILIES = ("chatml", "llama", "gemma2")

AIO = "aiohttp aiosignal frozenlist multidict yarl propcache aiohappyeyeballs requests urllib3<3"
HYDRA = "hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3"
VERL = f"verl==0.9.1 {HYDRA} tensordict==0.10.0 ray==2.55.0 codetiming torchdata msgpack pyvers importlib_metadata \
zipp cloudpickle orjson pylatexenc {AIO}"
PACKAGES = {
    "openrlhf": f"openrlhf==0.11.2 ray==2.55.0 deepspeed==0.19.6 hjson ninja py-cpuinfo einops msgpack torchdata \
loralib jsonlines optree pynvml nvidia-ml-py torchmetrics lightning-utilities pylatexenc {AIO}",
    "verl": VERL,
    "trl": "",
    "nemo-rl": HYDRA,
    "llamafactory": f"llamafactory==0.9.5 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 transformers==5.6.0 \
huggingface_hub<2 tokenizers<=0.23.0 httpx==0.28.1 httpcore==1.0.9 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 \
datasets==4.0.0 dill<0.3.9 multiprocess<0.70.17 fsspec<=2025.3.0 fire termcolor av sse-starlette einops scipy tiktoken \
torchdata modelscope {AIO}",
}
STAGES = {"openrlhf": "ppo", "verl": "ppo", "trl": "grpo", "nemo-rl": "grpo", "llamafactory": "ppo"}


def make_environment(folder: Path, engine: str) -> Path:
    """The Python of an environment with the engine; it takes what it lacks from the current one."""
    python = folder / f"env-{engine}" / "bin" / "python"
    if not PACKAGES[engine]:
        return Path(sys.executable)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        site = next((python.parent.parent / "lib").glob("python*")) / "site-packages"
        (site / "zz_base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES[engine].split()]
        subprocess.run(command, check=True)
    return python


def make_model(folder: Path, family: str, count: int) -> tuple[Path, Path]:
    """(a random reward model of the family, its own scores of `count` responses as JSON Lines, for the probe)."""
    import models
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from cai.models import scorer

    reward = folder / f"reward-{family}"
    model = AutoModelForSequenceClassification.from_pretrained(models.folder(family), num_labels=1)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, 0, 0.3)
    tokenizer = AutoTokenizer.from_pretrained(models.folder(family))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    loaded = scorer.load_scorer(str(reward))
    rows = [
        ([{"role": "user", "content": f"How do I open gate {n}?"}], f"Ask for key {n}{', then push' * (n % 4)}.")
        for n in range(count)
    ]
    scores = folder / f"scores-{family}.jsonl"
    with scores.open("w") as file:
        for (prompt, response), score in zip(rows, loaded.scores(rows, show_progress=False), strict=True):
            row = {"prompt": prompt, "response": response, "score": score, "end": loaded.chat.stop_id}
            file.write(json.dumps(row) + "\n")
    return reward, scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for environments and exports")
    parser.add_argument("--engine", action="append", choices=list(PACKAGES), help="default: all")
    parser.add_argument("--responses", type=int, default=50)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    import models

    for family in FAMILIES:
        reward, scores = make_model(args.folder, family, args.responses)
        prompts = args.folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"Is it {n}?"}) + "\n" for n in range(16)))
        policy = models.folder(family)
        for engine in args.engine or PACKAGES:
            output = args.folder / f"{engine}-{family}"
            command = [sys.executable, ROOT / "scripts/export.py", "--input", prompts, "--to", engine, "--stage",
                       STAGES[engine], "--gpus", "2", "--model", policy, "--reward-model", reward, "--output", output,
                       "--max-new-tokens", "32", "--overwrite"]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
            program = Path(__file__).with_name("handover_probe.py")
            probe = [make_environment(args.folder, engine), program, engine, output]
            probe += ["--policy", policy, "--scores", scores]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(probe, capture_output=True, text=True, check=False, env=environment)
            text = done.stdout if done.returncode == 0 else done.stderr
            print(engine, family, (text.strip().splitlines() or ["no output"])[-1], flush=True)


if __name__ == "__main__":
    main()
