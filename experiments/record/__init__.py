"""The record of a run: a folder that is written stage by stage, read back, and resumed from.

Files of a run folder:

    config.json      the settings
    axis.json        the axis
    versions.json    Python, packages, code digest, commit, device, threads
    events.jsonl     one line per finished stage
    texts.jsonl      one line per completion, with every reason for which it was dropped
    rounds/N/        vector, adapter and (during healing) training .safetensors
    processes.jsonl  when each process began and ended, and its peak memory
    log.txt          what those processes printed, of a study that ran on Ray
    .lock            held by the process that runs the study

Reports and plots are made from these files alone.

**Folder.** A run is kept in `runs/AXIS-MODEL-seedSEED-DIGEST`, or in `--out`. The digest covers
settings, axis, code and package versions: the same command continues where the last process ended,
any other gets another folder. A folder of another run, or of other weights, is refused.

**When a stage counts.** A stage is finished once its line in `events.jsonl` is complete; its texts
and tensors are written before. Resuming discards an incomplete last line and texts beyond the last
event. Every line has a checksum of itself and all lines before it, every tensor file one of its
content; a modified file is refused. The training state is saved about every 20 seconds.

**Signals.** Ctrl-C and SIGTERM end a run between two writes, and the command that continues it is
printed. After SIGKILL or a power failure the same command continues it too.

**Determinism.** The same seed on the same machine, versions and thread count gives the same bits.
A run that was killed at any moment and resumed equals an uninterrupted one, except for times and
`processes.jsonl`; `make crash` tests this on real weights. Another device, thread count or batch
size changes the last bits of floating-point results. Each random draw belongs to its prompt, not to
its place in a batch, so a sampled text changes only where a draw falls within those last bits.
"""
