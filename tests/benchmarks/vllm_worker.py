"""vLLM by its own Python interface, for engines.py: a request per line of JSON in, an answer per line out.

    VLLM_PYTHON vllm_worker.py MODEL DTYPE MAX_LEN

Runs in vLLM's environment and imports nothing of this project. Greedy, without seeds, and with an empty prefix cache
at the start of every request.
"""

import json
import os
import sys
import time

# Only answers go to the standard output; what vLLM prints goes to the standard error.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(llm, request: dict) -> dict:
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    if request["task"] == "generate":
        sampling = SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"])
        start = time.perf_counter()
        outputs = llm.chat(request["conversations"], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        texts = [output.outputs[0].text.strip() for output in outputs]
        return {"seconds": seconds, "texts": texts, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}
    sampling = SamplingParams(temperature=1.0, max_tokens=1, logprobs=20)
    more = {"continue_final_message": True, "add_generation_prompt": False}
    start = time.perf_counter()
    outputs = llm.chat(request["conversations"], sampling, use_tqdm=False, **more)
    seconds = time.perf_counter() - start
    chosen = []
    for output in outputs:
        listed = {entry.decoded_token.strip(): entry.logprob for entry in output.outputs[0].logprobs[0].values()}
        chosen.append([listed.get(label) for label in request["labels"]])
    return {"seconds": seconds, "chosen": chosen}


def main() -> None:
    import vllm

    model, dtype, longest = sys.argv[1:]
    llm = vllm.LLM(model, dtype=dtype, max_model_len=int(longest), enable_prefix_caching=True, max_logprobs=20)
    print(json.dumps({"version": vllm.__version__}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, json.loads(line))), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
