"""What a decode step's last kernels are given: the seam between their code and the runtime.

A `Choice` is 8-byte fields in device memory, in the order of FIELDS, about n sequences that each
have one token in the step:

    ids i32[n], positions i32[n]   the step's inputs, which become the next one's
    greedy i64[n]                  the likeliest tokens, which `sample` replaces
    logits f32[n, vocabulary]
    steps i64[1]                   how many were done
    ring i32[slots, n]             in host memory: step number s leaves its tokens in s % slots
    sampling                       8-byte fields for each sequence, in the order of SAMPLING
"""

FIELDS = ("ids", "positions", "greedy", "logits", "steps", "ring", "slots", "sampling",
          "sequences", "vocabulary")
SAMPLING = ("temperature", "top_p", "min_p", "top_k", "seed", "choice")  # 3 f64, i64, 2 u64
