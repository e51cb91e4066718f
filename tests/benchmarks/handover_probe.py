"""What an engine itself makes of a folder of export.py: run by handover.py in the engine's own environment.

    ENVIRONMENT/bin/python tests/benchmarks/handover_probe.py openrlhf FOLDER --scores scores.jsonl

Prints one JSON object: {parsed, rows, largest}: whether the engine's own parser accepts the launch file, how many rows
its own data set class reads, and the largest difference between its scores and ours. Packages that need a GPU to be
installed (flash-attn, vLLM) are replaced by empty stand-ins, so that the engine's modules can be imported.
"""

import argparse
import ast
import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from unittest.mock import MagicMock

# What an engine imports though it is not needed here; the others import without.
STAND_INS = {"openrlhf": ("flash_attn", "vllm"), "llamafactory": ("torchaudio",)}

# Programs that launch files start: each is replaced by one that writes down its arguments.
PROGRAMS = ("python3", "deepspeed", "torchrun", "trl", "llamafactory-cli", "axolotl", "uv")


class _StandIn(ModuleType):
    __path__: ClassVar[list] = []
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def launched(folder: Path, **environment) -> list[str]:
    """The command line that launch.sh runs last, after bash has expanded it."""
    with tempfile.TemporaryDirectory() as temporary:
        record = Path(temporary) / "arguments"
        for name in PROGRAMS:
            program = Path(temporary) / name
            program.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" > "{record}"\n')
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        path = f"{temporary}:/usr/bin:/bin"
        subprocess.run(["bash", str(folder / "launch.sh")], check=True, env={"PATH": path, **environment})
        return record.read_text().split("\0")[:-1]


def main_block(module: str, arguments: list[str]):
    """The arguments that a module's `__main__` block passes to `train`, with its own parser and its own checks."""
    file = importlib.util.find_spec(module).origin
    tree = ast.parse(Path(file).read_text())
    captured = {}
    code = compile(tree, file, "exec")
    names = {"__name__": "imported", "__file__": file}
    exec(code, names)  # the functions and imports
    names["train"] = lambda args: captured.update(args=args)
    block = next(node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    sys.argv = [module, *arguments]
    exec(compile(ast.Module(block.body, []), file, "exec"), names)
    return captured["args"]


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def as_written(tokenizer, response, end):
    """The token ids that a policy has written: the response, and the token that ends it."""
    return tokenizer(response, add_special_tokens=False)["input_ids"] + [end]


# --- engines ------------------------------------------------------------------------------------------------


def probe_openrlhf(folder, policy, scores):
    import torch
    from openrlhf.datasets import PromptDataset, RewardDataset, SFTDataset
    from openrlhf.datasets.utils import blending_datasets

    program, *words = launched(folder, MODEL=policy)
    flag = "-m" if program == "python3" else "--module"
    place = words.index(flag)
    module, arguments = words[place + 1], words[place + 2 :]
    args = main_block(module, arguments)
    strategy = SimpleNamespace(args=args, is_rank_0=lambda: True, print=lambda *_: None)
    args.use_ms = False
    is_rl = module.endswith("ray")
    rows = blending_datasets(args.data.prompt_dataset if is_rl else args.data.dataset, None, strategy)
    tokenizer = tokenizer_of(policy)
    if is_rl:
        data = PromptDataset(rows, tokenizer, strategy)
    elif module.endswith("sft"):
        data = SFTDataset(rows, tokenizer, args.data.max_len, strategy, num_processors=1)
    else:
        is_dpo = module.endswith("dpo")
        data = RewardDataset(rows, tokenizer, args.data.max_len, strategy, is_dpo=is_dpo, num_processors=1)
    result = {"rows": len(data), "first": str(data[0])[:80]}
    if not scores:
        return result
    import openrlhf.utils.utils
    from openrlhf.datasets.prompts_dataset import preprocess_data
    from openrlhf.models import get_llm_for_sequence_regression
    from openrlhf.utils.utils import zero_pad_sequences

    openrlhf.utils.utils.convert_to_torch_dtype = lambda name: torch.float32  # it knows bf16 and fp16 only
    model = get_llm_for_sequence_regression(str(folder / "reward"), "reward", attn_implementation="eager").eval()
    sequences = []
    for row in scores:
        text, _ = preprocess_data(row, None, "prompt", None, tokenizer.apply_chat_template)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        sequences.append(torch.tensor([ids + as_written(tokenizer, row["response"], row["end"])]))
    masks = [torch.ones_like(ids) for ids in sequences]
    with torch.no_grad():
        values = model(
            zero_pad_sequences(sequences, value=tokenizer.pad_token_id or 0), zero_pad_sequences(masks)
        ).tolist()
    return {**result, "largest": max(abs(a - row["score"]) for a, row in zip(values, scores, strict=True))}


def probe_verl(folder, policy, scores):
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    _, *words = launched(folder, MODEL=policy)
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    is_rl = module.endswith("main_ppo")
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        config = compose("ppo_trainer" if is_rl else "sft_trainer_engine", overrides=arguments)
    tokenizer = tokenizer_of(policy)
    if not is_rl:
        from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

        data = MultiTurnSFTDataset(config.data.train_files, tokenizer, config.data)
        return {"rows": len(data), "first": str(data[0])[:80]}
    from verl.utils.config import validate_config
    from verl.utils.dataset.rl_dataset import RLHFDataset

    validate_config(config, use_reference_policy=True, use_critic=config.algorithm.adv_estimator == "gae")
    omega_conf_to_dataclass(config.reward.reward_model)
    data = RLHFDataset(config.data.train_files, tokenizer, config.data)
    result = {"rows": len(data), "first": str(data[0])[:80]}
    if not scores:
        return result
    import torch
    from transformers import AutoModelForSequenceClassification
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    reward = folder / "reward"
    own = tokenizer_of(reward)
    # ray wraps nothing here: the class is a plain one
    worker = SimpleNamespace(input_tokenizer=tokenizer, reward_model_tokenizer=own)
    # vLLM can't be installed without a GPU: its pass is a sequence classifier's, scored at the last token
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    differences = []
    for row in scores:
        ids = torch.tensor(as_written(tokenizer, row["response"], row["end"]))
        item = SimpleNamespace(
            non_tensor_batch={"raw_prompt": row["prompt"]},
            batch={"responses": ids, "attention_mask": torch.ones(len(ids), dtype=torch.long)},
        )
        text = asyncio.run(RewardLoopWorker._preprocess_reward_inputs(worker, [item]))
        with torch.no_grad():
            value = model(**own(text, return_tensors="pt")).logits[0, -1]
        differences.append(abs(float(value) - row["score"]))
    return {**result, "largest": max(differences)}


def probe_trl(folder, policy, scores):
    from trl.cli.commands import get_commands  # noqa: F401, that the command line imports at all
    from trl.scripts.utils import get_dataset

    _, stage, *words = launched(folder, MODEL=policy)
    os.chdir(folder)
    module = importlib.import_module(f"trl.scripts.{stage}")
    own = ("--accelerate_config", "--num_machines", "--num_processes", "--machine_rank", "--main_process_ip",
           "--main_process_port")  # fmt: skip
    kept = [word for n, word in enumerate(words) if word not in own and (n == 0 or words[n - 1] not in own)]
    parser = module.make_parser()
    sys.argv = [stage, *kept, "--bf16", "false", "--use_cpu", "true"]
    _, training, _, data = parser.parse_args_and_config(fail_with_unknown_args=True)
    dataset = get_dataset(data)["train"]
    result = {"rows": len(dataset), "first": str(dataset[0])[:80]}
    if not scores:
        return result
    import torch
    from trl import GRPOTrainer

    training.use_vllm = False
    training.output_dir = tempfile.mkdtemp()
    tokenizer = tokenizer_of(policy)
    trainer = GRPOTrainer(
        policy, str(folder / "reward"), args=training, train_dataset=dataset, processing_class=tokenizer
    )
    prompts = [row["prompt"] for row in scores]
    written = [as_written(tokenizer, row["response"], row["end"]) for row in scores]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    inputs = [{"prompt": prompt} for prompt in prompts]
    values = trainer._calculate_rewards(inputs, prompts, completions, written)
    values = values[0] if isinstance(values, tuple) else values
    values = torch.as_tensor(values)[:, 0].tolist()
    return {**result, "largest": max(abs(a - row["score"]) for a, row in zip(values, scores, strict=True))}


def probe_llamafactory(folder, policy, scores):
    import yaml
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    _, _, file, *words = launched(folder, MODEL=policy)
    os.chdir(folder)
    settings = yaml.safe_load(Path(file).read_text()) | dict(word.split("=", 1) for word in words)
    # what a machine without a GPU refuses
    settings |= {"bf16": False, "output_dir": tempfile.mkdtemp(), "preprocessing_num_workers": 1}
    settings.pop("deepspeed", None)
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(settings)
    parts = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(parts["tokenizer"], data_args)
    stage = settings["stage"]
    data = get_dataset(template, model_args, data_args, training_args, stage=stage, **parts)["train_dataset"]
    result = {"rows": len(data), "first": str(data[0])[:80]}
    if not scores:
        return result
    import torch
    from llamafactory.train.trainer_utils import create_reward_model

    model = create_reward_model(None, model_args, finetuning_args).eval().float()
    tokenizer = tokenizer_of(policy)
    differences = []
    for row in scores:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = torch.tensor([ids + as_written(tokenizer, row["response"], row["end"])])
        with torch.no_grad():
            values = model(input_ids=batch, attention_mask=torch.ones_like(batch), return_dict=True, use_cache=False)[
                -1
            ]
        differences.append(abs(float(values[0, -1]) - row["score"]))
    return {**result, "largest": max(differences)}


def probe_axolotl(folder, policy, scores):
    import yaml
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    words = launched(folder, MODEL=policy)
    os.chdir(folder)
    settings = yaml.safe_load(Path(words[2]).read_text())
    settings["base_model"] = policy
    config = validate_config(
        DictDefault(settings),
        capabilities={"bf16": True, "fp8": False, "tf32": True, "n_gpu": 2, "n_node": 2, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.11.0"},
    )
    normalize_config(config)
    result = {"rows": len(read_rows(folder)), "first": ""}
    strategy_of(config, policy, result)
    return result


def strategy_of(config, policy, result):
    """The rows through Axolotl's own prompt strategies."""
    if config.rl == "grpo":
        return
    tokenizer = tokenizer_of(policy)
    rows = read_rows(Path())
    if config.rl == "dpo":
        from axolotl.prompt_strategies.dpo import load

        transform, _ = load(config.datasets[0].type, config, dataset_idx=0)
        result["first"] = str([transform(row, tokenizer=tokenizer) for row in rows])[:80]
    elif config.reward_model:
        from axolotl.prompt_strategies.bradley_terry import load

        strategy = load(config.datasets[0].type.removeprefix("bradley_terry."), tokenizer, config, config.datasets[0])
        result["first"] = str([strategy._tokenize_single_prompt(dict(row)) for row in rows])[:80]
    else:
        from axolotl.prompt_strategies import load

        strategy = load(config.datasets[0].type, tokenizer, config, config.datasets[0])
        result["first"] = str([strategy.tokenize_prompt(row) for row in rows])[:80]


def probe_nemo_rl(folder, policy, scores):
    source = Path(os.environ["NEMO_RL"])
    spec = importlib.util.spec_from_file_location("nemo_config", source / "nemo_rl/utils/config.py")
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    _, _, _, _, base, *overrides = launched(folder, MODEL=policy, NEMO_RL=str(source))
    config.register_omegaconf_resolvers()
    loaded = config.parse_hydra_overrides(config.load_config(source / base), overrides)
    from omegaconf import OmegaConf

    OmegaConf.to_container(loaded, resolve=True)
    rows = read_rows(folder)
    return {"rows": len(rows), "first": str(rows[0])[:80]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--scores", type=Path)
    args = parser.parse_args()
    # last, so that a real package is preferred
    sys.meta_path.append(_Finder(STAND_INS.get(args.engine, ())))
    scores = [json.loads(line) for line in args.scores.read_text().splitlines()] if args.scores else []
    probe = globals()[f"probe_{args.engine.replace('-', '_')}"]
    print(json.dumps(probe(args.folder.resolve(), args.policy, scores)))


if __name__ == "__main__":
    main()
