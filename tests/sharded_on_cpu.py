"""Run a command on CPU processes with the sharding that its launcher asks for.

    accelerate launch --config_file templates/accelerate/fsdp2.yaml tests/sharded_on_cpu.py scripts/sft.py --device cpu

accelerate 1.15 reads a configuration of FSDP2 or DeepSpeed on any device, but uses it on accelerators only. Here its
state takes what it has read for CPU processes as well; all that follows is the libraries' own.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import state

# Printed with accelerate's kind of distribution when the command has ended.
MARK = "it was distributed as"


def shard_on_cpu() -> None:
    """Let accelerate's state take the plugin of FSDP or DeepSpeed for processes on a CPU."""
    start = state.AcceleratorState.__init__

    def start_sharded(self, mixed_precision=None, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        plugins = {"fsdp_plugin": fsdp_plugin, "deepspeed_plugin": deepspeed_plugin}
        start(self, mixed_precision, *args, **plugins, **kwargs)
        if self.distributed_type != state.DistributedType.MULTI_CPU:
            return
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
        elif deepspeed_plugin is not None:
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.distributed_type = state.DistributedType.DEEPSPEED
            self.deepspeed_plugins = {"default": deepspeed_plugin}
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = start_sharded
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        join = state.PartialState.__init__

        def join_deepspeed(self, *args, **kwargs):
            join(self, *args, **kwargs)
            if torch.distributed.is_initialized():
                import deepspeed

                deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

        state.PartialState.__init__ = join_deepspeed


def main() -> None:
    asked = [os.environ.get(f"ACCELERATE_USE_{name}", "") for name in ("FSDP", "DEEPSPEED")]
    assert "true" in asked, "start it under accelerate launch with FSDP or DeepSpeed"
    shard_on_cpu()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        # One write, so that the lines of two processes do not mix.
        kind = state.PartialState._shared_state.get("distributed_type")
        sys.stderr.write(f"{MARK} {kind}\n")


if __name__ == "__main__":
    main()
