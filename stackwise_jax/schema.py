"""What a run is: frozen dataclasses that hold every default, each field explained where it stands.

Code reads these; a person edits the `ConfigDict` that mirrors them (`config.default()`). Nothing here checks anything:
`config.resolve()` does.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig:
    """The rack: `n_stacks` stacks of `blocks_per_stack` blocks."""

    n_stacks: int = 4  # stacks of the rack
    blocks_per_stack: int = 1  # blocks in each


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """What bounds the residual branches, the matrices and the logits; all off by default."""

    residual_gain: float | None = None  # a learned factor per block on what it adds, beginning here; None: none
    spectral_norm: float | None = None  # limit on the largest singular value of live matrices of stacks; None: none
    z_loss: float = 0.0  # weight of log(sum(exp(logits)))**2 in the training loss (PaLM: 1e-4); never in evaluations


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary positions are stretched to texts longer than those a model began with."""

    kind: str = "none"  # none | linear (all wavelengths times factor) | llama3 (the long ones, as LLaMA 3.1 does)
    factor: float = 8.0  # what wavelengths are multiplied by
    low_frequency_factor: float = 1.0  # of llama3: wavelengths above original_positions over it are stretched wholly
    high_frequency_factor: float = 4.0  # of llama3: those below original_positions over it are not; between, in part
    original_positions: int = 8192  # of llama3: longest text before stretching


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Low-rank latents that queries, keys and values are made from (attention_kind mla or mlgka)."""

    form: str = "shared"  # shared (one latent for keys and values, and a rotary key: DeepSeek-V2) | separate (latents)
    kv_rank: int | None = None  # width of the latent of keys and values; None: 4 * d_head
    query_rank: int | None = None  # width of the latent of queries; None: they have none
    d_rope: int | None = None  # of form shared: width of the rotary key and its part of a query; None: d_head / 2
    d_value: int | None = None  # width of a head's values; None: d_head


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Weights exp(scale * k(query, key)) with a kernel k of random features (attention_kind kernel or mlgka)."""

    family: str | None = None  # gaussian | laplacian | uniform | linear (the dot product); None: gaussian, or laplacian
    form: str = "softmax"  # softmax: all pairs of places | linear: in linear time, the exponential by positive features
    n_features: int = 128  # a cosine and a sine of each of half as many random frequencies; not of family linear
    positive_features: int = 128  # of form linear
    bandwidth: float | None = None  # distance of a kernel; None: sqrt of the width of a key, of laplacian that width
    scale: float | None = None  # None: sqrt of the width of a key; 1 in form linear, where errors grow as exp(2 scale)
    seed: int = 0  # of frequencies, which are not trained


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The feed-forward as a mixture of experts, none of which ever refuses a token."""

    count: int = 0  # experts of a block that a router chooses from; 0: a dense feed-forward of width model.d_ff
    active: int = 2  # of them for each token
    shared: int = 0  # experts beside these, which every token goes through
    d_ff: int | None = None  # hidden width of an expert; None: model.d_ff
    normalises: bool = True  # weights of the active ones add up to 1 (Mixtral) | False: shares of all (Switch)
    balance: float = 0.01  # weight of the load-balance loss in training: 1 for even loads; never in evaluations
    z_loss: float = 0.0  # weight of the router's log(sum(exp(logits)))**2 in training (ST-MoE: 1e-3)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Transformer, assembled from choices (`models/families.py` lists the public families)."""

    vocab_size: int = 2048  # rows of the token table; the tokenizer has at most as many pieces
    d_model: int = 128  # width of the residual stream
    d_embedding: int | None = None  # columns of the token table, which a map takes to d_model; None: d_model, no map
    fixed_table: bool = False  # the token table stays as it is given or drawn; the rest of the embedding is trained
    n_heads: int = 4  # query heads
    n_kv_heads: int | None = None  # None: n_heads (multi-head); fewer: grouped queries
    d_head: int | None = None  # None: d_model / n_heads
    d_ff: int = 512  # hidden width of the feed-forward
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_position: str = "pre"  # pre | post (post has no final norm: the last block ends in one)
    norm_epsilon: float = 1e-5  # added to the variance
    norm_bias: bool = True  # every LayerNorm adds a vector
    first_attention_norm: bool = True  # False: the first block reads the embedding as it is (pre-norm; ModernBERT)
    ffn: str = "swiglu"  # swiglu | geglu | gelu (GELU by tanh) | geglu_erf | gelu_erf (GELU as defined)
    fixed_maps: str = "none"  # none | up | up_and_gate: of feed-forwards: they stay the random numbers they begin as
    positions: str = "rotary"  # rotary | learned | none
    rope_theta: float = 10000.0  # longest wavelength of rotary positions, over 2 pi
    rope_theta_local: float | None = None  # of blocks with a window, beside some without; None: rope_theta
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    max_positions: int | None = None  # rows of a learned table; None: data.seq_len
    token_types: int = 0  # rows of a table of token types (BERT: 2); the first is read where none are given
    embedding_norm: bool = False  # a norm right after the embedding, as in BERT
    use_bias: bool = False  # in every linear map of a block
    ties_embedding: bool = False  # the head reads the embedding's table
    head_transform: bool = False  # a linear map, the activation of the blocks and a norm before the head's table (BERT)
    logit_bias: bool = False  # the head adds a number to every logit
    dropout: float = 0.0  # of live stacks and a live embedding; a frozen trunk has none
    attention: str = "causal"  # causal | bidirectional
    causal_from: int | None = None  # blocks from this number on look back alone, in a bidirectional rack; None: none do
    attention_kind: str = "mha"  # mha (grouped queries too) | mla (latents) | kernel | mlgka (latents and a kernel)
    latent: LatentConfig = LatentConfig()
    kernel: KernelConfig = KernelConfig()
    experts: ExpertsConfig = ExpertsConfig()
    window: int | None = None  # attention reaches so many places to either side; None: all
    global_every: int | None = None  # with a window: blocks 0, n, 2 n .. have none; None: every block has it
    time_input: bool = False  # blocks are told the masked fraction (adaptive norms); follows objective.time
    attention_implementation: str = "auto"  # auto | reference | xla | cudnn; a named one that cannot serve is an error
    init_std: float = 0.02  # of every matrix; maps onto the residual stream start smaller
    architecture: ArchitectureConfig = ArchitectureConfig()
    stability: StabilityConfig = StabilityConfig()

    @property
    def n_blocks(self) -> int:
        return self.architecture.n_stacks * self.architecture.blocks_per_stack

    @property
    def is_gated(self) -> bool:
        """The feed-forward multiplies its activation by a second linear map."""
        return self.ffn in ("swiglu", "geglu", "geglu_erf")

    @property
    def has_experts(self) -> bool:
        return self.experts.count > 0

    @property
    def has_latents(self) -> bool:
        return self.attention_kind in ("mla", "mlgka")

    @property
    def has_kernel(self) -> bool:
        return self.attention_kind in ("kernel", "mlgka")

    @property
    def is_linear_time(self) -> bool:
        """Attention keeps sums of the past instead of its places."""
        return self.has_kernel and self.kernel.form == "linear"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes rows."""

    source: str = "embedded"  # embedded | files, globs, tfds:NAME, comma-separated | a mixture: "a.txt@0.3; b.txt@0.7"
    validation_source: str = ""  # likewise; empty: hold out `validation_fraction` of the documents of each source
    validation_fraction: float = 0.05  # of documents, chosen by a hash of their text
    text_field: str = "text"  # of .jsonl files and data sets
    tfds_dir: str = ""  # where prepared TensorFlow Datasets lie; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets
    tokenizer: str = ""  # a SentencePiece model or a tokenizer.json; empty: train one of model.vocab_size pieces
    seq_len: int = 256  # tokens a row
    isolate_documents: bool = True  # attention stays inside a document of a packed row
    max_bytes: int | None = None  # of text read from each source; None: all
    max_rows: int | None = None  # rows trained on; None: all; sources with weights repeat when it asks for more
    prepared: str = ""  # a folder that `prepare` made; then no source is read; empty: prepare or find it by the source
    cache_dir: str = ""  # prepared corpora and tokenizers; empty: $STACKWISE_CACHE or ~/.cache/stackwise_jax


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted. Rates are masked fractions of the eligible places."""

    name: str = "clm"  # clm | mlm | prefix | diffusion | block_diffusion | mixed
    mixture: str = ""  # of mixed: objectives and their shares of the updates, "clm@0.5; diffusion@0.5"
    shift: bool = False  # masked places too are predicted one place before, so that one head serves every objective
    rate_min: float | None = None  # lowest masked fraction; None: 0.15 (mlm), 0.001 (diffusion: the floor of the bound)
    rate_max: float | None = None  # highest; equal to rate_min: a fixed rate; None: 0.15 (mlm), 1 (diffusion)
    rate_draw: str = "low_discrepancy"  # over rows and visits | stratified (over the rows of a batch) | independent
    mask_form: str = "bernoulli"  # bernoulli | count
    replacement: str = "bert"  # of mlm: bert (80 % mask, 10 % random, 10 % kept) | mask (always the mask)
    mask_variants: int = 4  # corruptions of a row in the cache; visits beyond them see these again
    noise_schedule: str = "linear"  # density of rates in training: linear | cosine | polynomial; one bound for all
    weighting: str = "bound"  # of diffusion: bound (1/rate, times what the schedule's density asks for) | uniform
    max_weight: float | None = None  # larger weights are clipped, and the training loss is no bound; None: never
    block_length: int = 16  # places of a block, of block_diffusion
    prefix_share: float = 0.5  # longest prefix, as a share of the row, of prefix; lengths are uniform below it
    time: str = "none"  # none | input (the model is told the rate) | depth (bands of rates have stacks) | depth_input
    n_bands: int | None = None  # of time=depth; None: as many as there are stacks, at most 4
    levels: str = ""  # time=depth at fixed rates: linear | cosine | exponential | geometric | "0.9,0.5,0.15"; "": bands
    level_min: float = 0.15  # lightest level of a pattern
    level_max: float = 0.9  # heaviest level of a pattern
    noise_order: str = "high_to_low"  # noise from the leftmost stacks to the rightmost: high_to_low | low_to_high
    consistency: float = 0.0  # weight of the pull on a band's output towards E(token), where the next band sees it


@dataclasses.dataclass(frozen=True)
class ProgressiveConfig:
    """How a rack grows, one stack (or band of stacks) a phase."""

    enabled: bool = True  # False: every stack is live in one phase, which is training.mode='end_to_end'
    direction: str = "left_to_right"  # append | right_to_left: prepend, gradient through the tail | independent: bands
    trunk_strategy: str = "frozen"  # of mode=progressive: frozen | qlora (adapters beside it) | full (trained on)
    new_stack: str = "drawn"  # beside settled ones: drawn | silent (it adds nothing yet: the loss goes on from theirs)
    new_stack_precision: str | None = None  # of live stacks: as precision.compute (None: the same), or fp8
    cache_activations: bool | None = None  # keep what the trunk puts out; None: wherever a path allows it
    learning_rate_decay: float = 1.0  # from the phase of a stack to that of the next, of the stack's learning rate
    shares: str = ""  # of the updates of all stacks' phases, for each in turn: "0.7,0.1,0.1,0.1"; "": equal
    last_stacks: int = 0  # the last stacks are live in every phase and end its path; those between are skipped
    anchor_every: int | None = None  # every so many updates train the whole path; None: never
    rebuild_every: int | None = None  # with anchors and a cache: steps after which the cache is computed anew


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """Racks that grow while all their stacks stay live (mode=progressive, trunk_strategy=full)."""

    operator: str = "random"  # of new stacks: random | copy (the whole again) | interleave | zero_output (adds nothing)
    sizes: str = ""  # stacks in each phase: "" (one more a phase) | late (1, then all) | doubling | "1,4,12"
    shares: str = ""  # of training.phase_budget, which is then the whole run's, for each phase: "0.8,0.2"; "": equal


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Phases in which trained stacks are trained together: after growth, or (mode=fusion) of other runs."""

    sources: str = ""  # of mode=fusion: run folders whose stacks follow one another, "runs/a; runs/b:4-7"
    budget: str = ""  # of fusion in all, such as "300 steps"; "": no such phase
    live: str = "all"  # all | last:4 (the last four stacks) | adapters (low-rank parts of all stacks, head live)
    embedding: str = "live"  # live | frozen
    unfreeze_phases: int = 1  # the live stacks join in so many phases, from the head down
    opening: float = 0.0  # share of the budget over which attention opens from causal to bidirectional
    opening_stages: int = 8  # in so many stages; at stage k every place sees the first k / opening_stages of its row
    trunk_learning_rate_scale: float = 1.0  # of every live stack but the last
    learning_rate_scale: float = 1.0  # of everything, in these phases


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank parts trained beside settled stacks (LoRA; Hu et al., 2021), where a path gives a stack that role."""

    rank: int = 8  # of every stack, or the largest of a pattern
    ranks: str = "constant"  # constant | increasing | decreasing (in equal steps up to or down from rank) | "4,8,8,16"
    alpha: float = 16.0  # the low-rank part is multiplied by alpha / rank
    targets: str = "all"  # linear maps: all, or some of query,key,value,output,up,gate,down, and latents
    learning_rate_scale: float = 1.0  # of optimizer.learning_rate; adapters are trained by AdamW, without decay
    merge: bool = False  # when they settle they are added into the weights, instead of kept beside them


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The curriculum and the step. A budget reads "200 steps", "1_500 steps", "5M tokens" or "1.2B tokens"."""

    mode: str = "stackwise"  # layerwise | blockwise | stackwise | progressive | fusion | end_to_end
    block_group: int = 1  # blocks a stack in blockwise mode
    embedding_phase: str = "alone"  # alone (phase 0: embedding and head) | with_first_stack | given (never trained)
    embedding_from: str = ""  # a finished run, such as convert makes of a checkpoint, whose token table is the start
    head: str = "live"  # after the embedding is settled: live | frozen | copy (untie, then live)
    phase_budget: str = "200 steps"  # of each stack's phase (end_to_end: of the run); or "5M tokens"
    embedding_budget: str = "100 steps"  # of phase 0
    embedding_learning_rate_scale: float = 1.0  # of the embedding (the head's is not scaled), in phase 0
    batch_size: int = 16  # rows an update
    accumulation_steps: int = 1  # micro-batches an update
    remat: str = "none"  # none | dots (keep matmul outputs) | full (keep block inputs only)
    execution: str = "auto"  # auto | fused | chained
    unroll_blocks: int = 16  # blocks of a live stack compiled one after another; a larger stack is a loop over them
    loss_chunk_tokens: int = 2048  # tokens whose logits exist at once
    loss_fraction: float = 1.0  # 1 / n: each update trains on the loss of one place in n; evaluations take all places
    progressive: ProgressiveConfig = ProgressiveConfig()
    growth: GrowthConfig = GrowthConfig()
    fusion: FusionConfig = FusionConfig()
    adapters: AdapterConfig = AdapterConfig()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) or Muon (Jordan, 2024), and the schedule that every phase restarts."""

    name: str = "adamw"  # adamw | muon (matrices of the blocks; the rest by AdamW)
    learning_rate: float = 1e-3  # peak
    muon_learning_rate: float = 0.02  # peak, of what Muon trains
    head_learning_rate_scale: float = 1.0  # of a head that stays live after the embedding is settled
    beta1: float = 0.9  # decay of the mean gradient
    beta2: float = 0.95  # decay of the mean squared gradient
    epsilon: float = 1e-8  # added to the root of the mean squared gradient
    weight_decay: float = 0.1  # of matrices only
    clip_norm: float = 1.0  # global gradient norm; 0: no clip
    schedule: str = "wsd"  # wsd (warm-up, stable, linear decay) | cosine
    warmup_fraction: float = 0.05  # of the phase
    decay_fraction: float = 0.2  # of the phase, in wsd
    final_fraction: float = 0.1  # learning rate at the end, of its peak


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Storage and arithmetic. Losses, norms, vectors and everything that is not named here are float32."""

    weights: str = "fp32"  # live matrices of stacks: fp32 | bf16 (updates rounded stochastically, no float32 copy)
    optimizer: str = "fp32"  # moments of matrices: fp32 | bf16 | int8 (blocks of 256), both rounded stochastically
    compute: str = "fp32"  # matmul inputs: fp32 | bf16 | fp16 (with dynamic loss scaling)
    trunk: str = "fp32"  # storage of a stack once frozen: fp32 | bf16 | fp16 | fp8 | nvfp4 | nf4
    trunk_compute: str | None = None  # matmuls of frozen stacks in training: as compute (None), or fp8
    cache: str = "fp32"  # storage of cached activations: fp32 | bf16 | fp8 (E4M3, a scale per token)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The activation cache."""

    tier: str = "auto"  # auto (the first with room) | device | host (pinned memory) | disk
    folder: str = ""  # of the disk tier; empty: cache/ in the run folder
    chunk_bytes: int = 128 * 2**20  # of activations that move together; rows are shuffled inside a chunk
    window_gib: float | None = None  # a larger cache is walked in windows of this size; None: all rows at once
    window_visits: int = 16  # passes over a window before the next, which costs a run through the trunk
    on_mismatch: str = "rebuild"  # rebuild | stop


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Several devices: data * fsdp of them. A run may be continued on another number."""

    data: int = 1  # groups of devices; each takes its share of the rows of a batch and of the cache
    fsdp: int = 1  # devices of a group, among which weights and optimiser state are divided besides
    distributed: bool = False  # one run in several processes; SLURM, Open MPI and TPU pods are recognised
    coordinator: str = ""  # elsewhere: HOST:PORT of process 0
    processes: int | None = None  # elsewhere: how many
    process_id: int | None = None  # elsewhere: which one this is, from 0

    @property
    def n_devices(self) -> int:
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Snapshots of the live state; every phase boundary is one besides."""

    every_minutes: float = 10.0  # between snapshots
    host_gib: float = 8.0  # of frozen stacks that stay in host memory; older ones are read from the run folder again
    every_steps: int | None = None  # also every so many steps of a phase
    keep: int = 2  # snapshots kept


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out text."""

    rows: int = 64  # held-out rows, for the loss after every phase
    every_steps: int | None = None  # also inside a phase
    ngrams: bool = False  # unigram and add-k bigram loss on the same tokens
    one_block_control: bool = False  # also train one block end to end at equal FLOPs


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Samples printed when a run ends, and the defaults of `python -m stackwise_jax.generate`."""

    samples: int = 0  # how many
    tokens: int = 96  # of each: at most (autoregressive), or exactly
    prompt: str = ""  # empty: from the beginning of a document
    sampler: str = "auto"  # auto (by the objective) | autoregressive | denoise | blocks
    temperature: float = 0.8  # 0: always the likeliest
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    repetition_penalty: float = 1.0  # divides the scores of what was said before; 1: none
    steps: int | None = None  # passes a sample, of samplers that unmask; None: one a masked place
    order: str = "confidence"  # of revealing: confidence | margin | entropy | random | left_to_right
    remask: float = 0.0  # probability that a pass masks a revealed place again, but for the last passes
    threshold: float | None = None  # also reveal every place this confident; steps are then the most; None: never
    block_length: int | None = None  # unmask blocks of so many places left to right; None: all places together


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Metrics go to metrics.jsonl always, and to TensorBoard files when the `tensorboard` extra is installed."""

    every_steps: int = 10  # between lines of metrics.jsonl
    peak_flops: float | None = None  # FLOP/s of one device, for MFU; None: by train/metrics.py, twice as many in fp8


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. Every field of every section is documented where it is declared."""

    name: str = "run"  # names the run folder where --workdir does not
    seed: int = 0  # of weights, order, masks and dropout
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    cache: CacheConfig = CacheConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig()
    logging: LoggingConfig = LoggingConfig()
