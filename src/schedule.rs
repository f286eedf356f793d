//! What runs, as plain data: `lower` turns a spec and a device's facts into a [`Schedule`].
//!
//! A long file: the data, what is refused and what makes the data change together.
//!
//! Pure: it alone picks kernels, variants and tiles, and it alone refuses. Printable with `{:#?}`.

use crate::error::{Error, Result, Unsupported};
use crate::kernels::grouped_gemm::{TILE_COLS, TILE_ROWS};
use crate::kernels::pack::{PackedMatrix, SPAN_WORDS};
use crate::kernels::{Access, Combine, GemmVariant, GroupedGemm, Operation, Permute, RowSource, TopkRouting};
use crate::spec::{
    Activation, Denominator, ExpertMlp, FloatType, LogitTransform, MoeSpec, Router, Routing, RoutingMethod,
    SharedCombination, SharedExperts, SharedGate, WeightFormat, WeightPosition,
};
use crate::support::{self, Scope, refuse};

/// What `lower` knows of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Name of the backend, for refusals.
    pub backend: &'static str,
    /// Largest storage binding in bytes.
    pub max_binding_bytes: u64,
    /// Largest number of workgroups in one dimension.
    pub max_workgroups: u32,
}

/// What the caller chooses. Changes no result beyond the order of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bound on one weight buffer, if below the device's.
    pub segment_bytes: Option<u64>,
    /// Up to how many tokens the matrix-vector kernels are used; 0 is never.
    pub decode_tokens: usize,
}

/// Up to this many tokens most experts that are touched are touched by one row, so a tile of 64
/// rows would be empty: the matrix-vector kernel reads each weight as often and does less.
pub const DECODE_TOKENS: usize = 8;

/// The kernels, constants, buffers and grids of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// What it covers.
    pub scope: Scope,
    /// Most tokens of one call.
    pub max_tokens: usize,
    /// Tokens that pass at once; more are cut into chunks of this size.
    pub chunk_tokens: usize,
    /// Every buffer.
    pub buffers: Vec<Buffer>,
    /// The packed weights.
    pub matrices: Vec<PackedMatrix>,
    /// Variants by number of tokens, ascending; the last takes all.
    pub buckets: Vec<Bucket>,
}

/// One buffer of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// By content.
    pub name: String,
    /// What it holds and who fills it.
    pub contents: Contents,
    /// Size: for `max_tokens` if it holds rows of all tokens, for one chunk if it is scratch. Whole words.
    pub bytes: u64,
    /// Bytes of one token, if it holds rows of all tokens and is cut into chunks.
    pub token_bytes: Option<u64>,
}

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Caller: [T, H].
    HiddenStates,
    /// Caller: u32 `[T]`.
    TokenIds,
    /// Caller: [T, H].
    Output,
    /// Scratch or caller: i32 [T, k].
    TopkIds,
    /// Scratch or caller: f32 [T, k].
    TopkWeights,
    /// Between two steps, for one chunk.
    Scratch,
    /// Number of tokens; one for each chunk.
    Params,
    /// Packed weights.
    Segment {
        /// Index into [`Schedule::matrices`].
        matrix: usize,
        /// Index into its segments.
        segment: usize,
    },
    /// Span table of a segment.
    Spans {
        /// Index into [`Schedule::matrices`].
        matrix: usize,
        /// Index into its segments.
        segment: usize,
    },
    /// `slots[id]` of each expert.
    ExpertSlots,
    /// f32 `[outputs]`.
    SelectionBias,
    /// i32 [`vocab_size`, k].
    Tid2eid,
}

/// The steps for up to so many tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Bucket {
    /// Most tokens (of a chunk) it is chosen for.
    pub max_tokens: usize,
    /// In order.
    pub steps: Vec<Step>,
}

/// Which half of the layer a step belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Up to ids and weights.
    Routing,
    /// Everything that reads them.
    Experts,
}

/// One dispatch.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What it computes, in the layer's words.
    pub name: String,
    /// Its half.
    pub part: Part,
    /// The kernel.
    pub operation: Operation,
    /// A buffer for each binding: indices into [`Schedule::buffers`].
    pub buffers: Vec<usize>,
    /// Workgroups.
    pub grid: Grid,
}

/// Workgroups of a step, as a formula over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// First dimension.
    pub x: Extent,
    /// Second dimension.
    pub y: Extent,
}

/// Workgroups in one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// So many.
    Fixed(usize),
    /// `ceil(tokens * items / per)`, at most `limit`: the kernel strides.
    PerToken {
        /// Items of a token.
        items: usize,
        /// Items of a workgroup.
        per: usize,
        /// Bound.
        limit: usize,
    },
    /// Bound on the tiles that a permutation of the rows can make.
    Tiles(Permute),
}

impl Extent {
    /// Workgroups for `tokens`.
    pub fn workgroups(self, tokens: usize) -> u32 {
        let count = match self {
            Self::Fixed(count) => count,
            Self::PerToken { items, per, limit } => (tokens * items).div_ceil(per).min(limit),
            Self::Tiles(permute) => permute.max_tiles(tokens * permute.top_k),
        };
        // `lower` has checked each extent at `chunk_tokens` against the device's limit.
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

impl Grid {
    /// Workgroups for `tokens`; no work if any is 0.
    pub fn workgroups(self, tokens: usize) -> [u32; 3] {
        [self.x.workgroups(tokens), self.y.workgroups(tokens), 1]
    }
}

impl Schedule {
    /// Bytes of packed weights and tables on the device.
    pub fn weight_bytes(&self) -> u64 {
        let table = |buffer: &&Buffer| match buffer.contents {
            Contents::Segment { matrix: _, segment: _ }
            | Contents::Spans { matrix: _, segment: _ }
            | Contents::ExpertSlots
            | Contents::SelectionBias
            | Contents::Tid2eid => true,
            Contents::HiddenStates
            | Contents::TokenIds
            | Contents::Output
            | Contents::TopkIds
            | Contents::TopkWeights
            | Contents::Scratch
            | Contents::Params => false,
        };
        self.buffers.iter().filter(table).map(|buffer| buffer.bytes).sum()
    }

    /// Bytes of scratch.
    pub fn scratch_bytes(&self) -> u64 {
        self.buffers.iter().filter(|buffer| buffer.contents.is_scratch()).map(|buffer| buffer.bytes).sum()
    }

    /// The bucket for a chunk of `tokens`.
    pub fn bucket(&self, tokens: usize) -> usize {
        self.buckets.iter().position(|bucket| tokens <= bucket.max_tokens).unwrap_or(self.buckets.len() - 1)
    }
}

impl Contents {
    /// Whether [`Scratch`](crate::Scratch) holds it (unless the caller gives it).
    pub fn is_scratch(self) -> bool {
        match self {
            Self::TopkIds | Self::TopkWeights | Self::Scratch => true,
            Self::HiddenStates
            | Self::TokenIds
            | Self::Output
            | Self::Params
            | Self::Segment { matrix: _, segment: _ }
            | Self::Spans { matrix: _, segment: _ }
            | Self::ExpertSlots
            | Self::SelectionBias
            | Self::Tid2eid => false,
        }
    }
}

/// Turns a spec into the schedule of a device.
///
/// # Errors
/// [`Error::Invalid`] for a spec or call that breaks a rule, [`Error::Unsupported`] with the field
/// that the backend lacks.
pub fn lower(
    spec: &MoeSpec,
    scope: Scope,
    max_tokens: usize,
    facts: &DeviceFacts,
    options: &Options,
) -> Result<Schedule> {
    spec.validate()?;
    if max_tokens == 0 || max_tokens > 1 << 24 {
        return Err(Error::invalid("max_tokens", max_tokens, "1 to 2^24", "plan for the largest batch you will run"));
    }
    supported(spec, scope, facts.backend)?;
    let mut lowering = Lowering::new(spec, scope, max_tokens, facts, options)?;
    lowering.buckets()?;
    Ok(lowering.schedule)
}

/// The first field that this crate's kernels lack.
fn supported(spec: &MoeSpec, scope: Scope, backend: &'static str) -> Result<(), Unsupported> {
    support::landed(backend, spec, scope)?;
    let lacks = |field, value: &dyn std::fmt::Debug, because: String| Err(refuse(backend, field, value, because));
    let MoeSpec {
        hidden_size: _,
        num_experts: _,
        top_k: _,
        router,
        routing,
        experts,
        shared,
        latent: _,
        lora: _,
        expert_input: _,
        output_bias: _,
        placement: _,
        shard: _,
        entry: _,
        precision: _,
    } = spec;
    match router {
        Router::Linear { input: _, format, bias: _, transform } => {
            scales_by_vector(backend, *format)?;
            match transform {
                LogitTransform::None => {}
                LogitTransform::SoftCap { cap: _ } | LogitTransform::Multiply { factor: _ } => {
                    return lacks("router.transform", transform, "no kernel transforms logits yet".into());
                }
            }
        }
        Router::Mlp { state_size: _, rms_norm_eps: _ } | Router::Given { transform: _ } => {
            return lacks("router", router, "no kernel for it yet".into());
        }
    }
    let Routing {
        method: _,
        renormalize,
        routed_scaling_factor: _,
        apply_routed_scale_to_output: _,
        per_expert_scale: _,
        weight_position,
        zero_experts: _,
        nan_policy: _,
    } = routing;
    match renormalize {
        None
        | Some(
            Denominator::Sum
            | Denominator::SumPlus { eps: _ }
            | Denominator::AtLeast { floor: _ }
            | Denominator::SumOrOne,
        ) => {}
        Some(Denominator::PNorm { p: _ }) => {
            return lacks("routing.renormalize", renormalize, "no fragment renormalize_p_norm".into());
        }
    }
    if scope == Scope::Routing {
        return Ok(());
    }
    match weight_position {
        WeightPosition::Output => {}
        WeightPosition::Input | WeightPosition::BeforeDown => {
            return lacks("routing.weight_position", weight_position, "weights act in combine only".into());
        }
    }
    let mut mlps = vec![("experts.activation", experts)];
    if let Some(SharedExperts { mlp, gate, combination }) = shared {
        match gate {
            SharedGate::None => {}
            SharedGate::Sigmoid { format: _ } => {
                return lacks("shared.gate", gate, "no kernel for the shared gate yet".into());
            }
        }
        match combination {
            SharedCombination::Sum => {}
            SharedCombination::Average => {
                return lacks("shared.combination", combination, "combine only adds yet".into());
            }
        }
        mlps.push(("shared.mlp.activation", mlp));
    }
    for (field, mlp) in mlps {
        scales_by_vector(backend, mlp.format)?;
        match mlp.activation {
            Activation::Swiglu { limit: _ }
            | Activation::SwigluClampAfter { limit: _ }
            | Activation::SwigluOai { alpha: _, limit: _, beta: _ }
            | Activation::Relu2 => {}
            Activation::Situ { beta: _, linear_beta: _ } => {
                return lacks(field, &mlp.activation, "no fragment activate_situ".into());
            }
            Activation::GeluTanh => return lacks(field, &mlp.activation, "no fragment activate_gelu_tanh".into()),
            Activation::GeluErf => return lacks(field, &mlp.activation, "no fragment activate_gelu_erf".into()),
        }
    }
    Ok(())
}

/// The GEMM kernels look a scale up once for each vector of 16 codes.
fn scales_by_vector(backend: &'static str, format: WeightFormat) -> Result<(), Unsupported> {
    match format {
        WeightFormat::Fp8Block { block: [_, columns], scale: _ } if columns % 16 != 0 => {
            Err(refuse(backend, "format.block", &format, "block columns must be a multiple of 16"))
        }
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 | WeightFormat::Fp8Block { block: _, scale: _ } => {
            Ok(())
        }
    }
}

struct Lowering<'a> {
    spec: &'a MoeSpec,
    facts: &'a DeviceFacts,
    options: &'a Options,
    schedule: Schedule,
}

/// The indices of a packed matrix in the schedule.
struct Placed {
    matrix: usize,
    /// (segment buffer, span buffer) of each segment.
    buffers: Vec<(usize, usize)>,
}

/// One GEMM before it is cut into segments and variants.
struct Gemm<'a> {
    name: &'a str,
    part: Part,
    rows: RowSource,
    input: (usize, FloatType, usize),
    placed: &'a Placed,
    activation: Option<Activation>,
    out: usize,
}

/// The buffers that steps share.
struct Shared {
    params: usize,
    topk_ids: usize,
    permuted: Option<(usize, usize, usize)>,
}

impl<'a> Lowering<'a> {
    fn new(
        spec: &'a MoeSpec,
        scope: Scope,
        max_tokens: usize,
        facts: &'a DeviceFacts,
        options: &'a Options,
    ) -> Result<Self> {
        let chunk_tokens = chunk_tokens(spec, scope, max_tokens, facts)?;
        let schedule = Schedule { scope, max_tokens, chunk_tokens, buffers: vec![], matrices: vec![], buckets: vec![] };
        Ok(Self { spec, facts, options, schedule })
    }

    fn buffer(&mut self, name: impl Into<String>, contents: Contents, bytes: usize) -> usize {
        // Bindings are whole words, and never empty.
        let bytes = (bytes.max(4) as u64).next_multiple_of(4);
        self.schedule.buffers.push(Buffer { name: name.into(), contents, bytes, token_bytes: None });
        self.schedule.buffers.len() - 1
    }

    /// A buffer with rows of `token_bytes` for all tokens.
    fn token_buffer(&mut self, name: &str, contents: Contents, token_bytes: usize) -> usize {
        let index = self.buffer(name, contents, self.schedule.max_tokens * token_bytes);
        self.schedule.buffers[index].token_bytes = Some(token_bytes as u64);
        index
    }

    fn place(&mut self, matrix: PackedMatrix) -> Result<Placed, Unsupported> {
        let limit = self.facts.max_binding_bytes;
        let segment_bytes = self.options.segment_bytes.unwrap_or(limit).min(limit);
        let matrix = matrix.place(self.facts.backend, segment_bytes)?;
        let index = self.schedule.matrices.len();
        let buffers = (0..matrix.segments.len())
            .map(|segment| {
                let name = |kind: &str| format!("{}.{kind}[{segment}]", matrix.name);
                let bytes = 4 * matrix.segments[segment].words;
                let codes = self.buffer(name("segment"), Contents::Segment { matrix: index, segment }, bytes);
                let bytes = 4 * SPAN_WORDS * matrix.groups;
                (codes, self.buffer(name("spans"), Contents::Spans { matrix: index, segment }, bytes))
            })
            .collect();
        self.schedule.matrices.push(matrix);
        Ok(Placed { matrix: index, buffers })
    }

    fn mlp(&mut self, names: [&'static str; 2], groups: usize, mlp: &ExpertMlp) -> Result<[Placed; 2], Unsupported> {
        let pair = if mlp.activation.gated() { 2 } else { 1 };
        let gate_up = PackedMatrix {
            name: names[0],
            groups,
            rows: pair * mlp.intermediate_size,
            cols: self.spec.hidden_size,
            format: mlp.format,
            pair,
            bias: mlp.gate_up_bias,
            segments: vec![],
        };
        let down = PackedMatrix {
            name: names[1],
            groups,
            rows: self.spec.hidden_size,
            cols: mlp.intermediate_size,
            format: mlp.format,
            pair: 1,
            bias: mlp.down_bias,
            segments: vec![],
        };
        Ok([self.place(gate_up)?, self.place(down)?])
    }

    fn buckets(&mut self) -> Result<()> {
        // The fields that are not named further are refused by `supported`.
        let MoeSpec {
            hidden_size,
            num_experts,
            top_k,
            router,
            routing,
            experts,
            shared,
            latent: None,
            lora: None,
            expert_input: _,
            output_bias: _,
            placement: _,
            shard: _,
            entry: _,
            precision,
        } = self.spec
        else {
            return Err(refuse(self.facts.backend, "latent or lora", &"Some", "no kernel for it yet").into());
        };
        let (hidden_size, num_experts, top_k) = (*hidden_size, *num_experts, *top_k);
        let outputs = self.spec.router_outputs();
        let chunk = self.schedule.chunk_tokens;
        let rows = chunk * top_k;
        let params = self.buffer("params", Contents::Params, 16);
        let hidden_states =
            self.token_buffer("hidden_states", Contents::HiddenStates, hidden_size * precision.input.bytes());
        let topk_ids = self.token_buffer("topk_ids", Contents::TopkIds, top_k * 4);
        let topk_weights = self.token_buffer("topk_weights", Contents::TopkWeights, top_k * 4);
        let logits = self.buffer("logits", Contents::Scratch, chunk * outputs * 4);
        let selection_bias =
            self.spec.has_selection_bias().then(|| self.buffer("selection_bias", Contents::SelectionBias, outputs * 4));
        let hash = match routing.method {
            RoutingMethod::Hash { score: _, vocab_size } => Some((
                self.token_buffer("token_ids", Contents::TokenIds, 4),
                self.buffer("tid2eid", Contents::Tid2eid, vocab_size * top_k * 4),
            )),
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
        };
        let (format, bias) = match *router {
            Router::Linear { input: _, format, bias, transform: _ } => (format, bias),
            Router::Mlp { state_size: _, rms_norm_eps: _ } | Router::Given { transform: _ } => {
                return Err(refuse(self.facts.backend, "router", router, "no kernel for it yet").into());
            }
        };
        let router_matrix = self.place(PackedMatrix {
            name: "router",
            groups: 1,
            rows: outputs,
            cols: hidden_size,
            format,
            pair: 1,
            bias,
            segments: vec![],
        })?;
        let routing_step = self.routing_step([params, logits, topk_ids, topk_weights], selection_bias, hash);
        let router_gemm = Gemm {
            name: "router_gemm",
            part: Part::Routing,
            rows: RowSource::Direct,
            input: (hidden_states, precision.input, 1),
            placed: &router_matrix,
            activation: None,
            out: logits,
        };
        let layer = match self.schedule.scope {
            Scope::Routing => None,
            Scope::Layer => Some((
                self.mlp(["experts.gate_up", "experts.down"], num_experts, experts)?,
                match shared {
                    None => None,
                    Some(SharedExperts { mlp, gate: _, combination: _ }) => {
                        Some((mlp, self.mlp(["shared.gate_up", "shared.down"], 1, mlp)?))
                    }
                },
            )),
        };
        let layer = layer.map(|(experts_placed, shared_placed)| {
            let expert_slots = self.buffer("expert_slots", Contents::ExpertSlots, num_experts * 4);
            let sorted_rows = self.buffer("sorted_rows", Contents::Scratch, rows * 4);
            let tiles = Permute { num_experts, top_k }.max_tiles(rows);
            let tiles = self.buffer("tiles", Contents::Scratch, (1 + tiles) * 16);
            let hidden = self.buffer("hidden", Contents::Scratch, rows * experts.intermediate_size * 4);
            let expert_out = self.buffer("expert_out", Contents::Scratch, rows * hidden_size * 4);
            let output = self.token_buffer("output", Contents::Output, hidden_size * precision.output.bytes());
            let shared = shared_placed.map(|(mlp, placed)| {
                let inner = self.buffer("shared_hidden", Contents::Scratch, chunk * mlp.intermediate_size * 4);
                (mlp, placed, inner, self.buffer("shared_out", Contents::Scratch, chunk * hidden_size * 4))
            });
            (experts_placed, shared, [expert_slots, sorted_rows, tiles, hidden, expert_out, output])
        });
        // The matrix-vector kernel has a workgroup a row.
        let decode_tokens = self.options.decode_tokens.min(chunk).min(self.facts.max_workgroups as usize / top_k);
        for (tokens, gemv) in [(decode_tokens, true), (chunk, false)] {
            if tokens == 0 || (!gemv && decode_tokens == chunk) {
                continue;
            }
            let mut steps = vec![];
            let mut shared_buffers = Shared { params, topk_ids, permuted: None };
            self.gemm(&mut steps, &router_gemm, gemv, &shared_buffers)?;
            steps.push(routing_step.clone());
            if let Some((experts_placed, shared, buffers)) = &layer {
                let [expert_slots, sorted_rows, tiles, hidden, expert_out, output] = *buffers;
                shared_buffers.permuted = Some((expert_slots, sorted_rows, tiles));
                if !gemv {
                    steps.push(Step {
                        name: "permute".into(),
                        part: Part::Experts,
                        operation: Operation::Permute(Permute { num_experts, top_k }),
                        buffers: vec![params, topk_ids, sorted_rows, tiles],
                        grid: Grid { x: Extent::Fixed(num_experts), y: Extent::Fixed(1) },
                    });
                }
                let routed = RowSource::Routed { top_k, num_experts };
                let in_type = precision.input;
                let x = (hidden_states, in_type, top_k);
                let mut gemms = vec![
                    ("experts.gate_up", routed, x, &experts_placed[0], Some(experts.activation), hidden),
                    ("experts.down", routed, (hidden, FloatType::F32, 1), &experts_placed[1], None, expert_out),
                ];
                if let Some((mlp, placed, inner, out)) = shared {
                    let (x, act) = ((hidden_states, in_type, 1), Some(mlp.activation));
                    gemms.push(("shared.gate_up", RowSource::Direct, x, &placed[0], act, *inner));
                    let x = (*inner, FloatType::F32, 1);
                    gemms.push(("shared.down", RowSource::Direct, x, &placed[1], None, *out));
                }
                for (name, rows, input, placed, activation, out) in gemms {
                    let gemm = Gemm { name, part: Part::Experts, rows, input, placed, activation, out };
                    self.gemm(&mut steps, &gemm, gemv, &shared_buffers)?;
                }
                let shared_out = shared.as_ref().map(|(_, _, _, out)| *out);
                steps.push(self.combine_step([params, topk_ids, topk_weights, expert_out, output], shared_out));
            }
            for step in &steps {
                let memory = step.operation.workgroup_bytes();
                if memory > WORKGROUP_BYTES {
                    let because =
                        format!("step {} needs {memory} of {WORKGROUP_BYTES} bytes of workgroup memory", step.name);
                    let field = "num_experts, top_k or n_group";
                    return Err(refuse(self.facts.backend, field, &num_experts, because).into());
                }
                let largest = step.grid.workgroups(tokens).into_iter().max().unwrap_or(0);
                if largest > self.facts.max_workgroups {
                    return Err(refuse(
                        self.facts.backend,
                        "hidden_size or intermediate_size",
                        &largest,
                        format!("step {} needs more than {} workgroups", step.name, self.facts.max_workgroups),
                    )
                    .into());
                }
            }
            self.schedule.buckets.push(Bucket { max_tokens: tokens, steps });
        }
        Ok(())
    }

    fn routing_step(&self, main: [usize; 4], bias: Option<usize>, hash: Option<(usize, usize)>) -> Step {
        let routing = &self.spec.routing;
        let operation = TopkRouting {
            router_outputs: self.spec.router_outputs(),
            top_k: self.spec.top_k,
            method: routing.method.clone(),
            renormalize: routing.renormalize,
            weight_scale: if routing.apply_routed_scale_to_output { 1.0 } else { routing.routed_scaling_factor },
            nan_policy: routing.nan_policy,
        };
        let mut buffers = main.to_vec();
        buffers.extend(bias);
        buffers.extend(hash.into_iter().flat_map(|(token_ids, tid2eid)| [token_ids, tid2eid]));
        let limit = self.facts.max_workgroups as usize;
        Step {
            name: "topk_routing".into(),
            part: Part::Routing,
            operation: Operation::TopkRouting(operation),
            buffers,
            grid: Grid { x: Extent::Fixed(1), y: Extent::PerToken { items: 1, per: 1, limit } },
        }
    }

    fn combine_step(&self, main: [usize; 5], shared_out: Option<usize>) -> Step {
        let routing = &self.spec.routing;
        let operation = Combine {
            hidden_size: self.spec.hidden_size,
            num_experts: self.spec.num_experts,
            top_k: self.spec.top_k,
            output_scale: if routing.apply_routed_scale_to_output { routing.routed_scaling_factor } else { 1.0 },
            shared: shared_out.is_some(),
            output: self.spec.precision.output,
        };
        let mut buffers = main.to_vec();
        buffers.extend(shared_out);
        // 64 invocations a workgroup, one word each; beyond the limit the kernel strides.
        let extent = Extent::PerToken { items: self.spec.hidden_size, per: 64, limit: 8192 };
        Step {
            name: "combine".into(),
            part: Part::Experts,
            operation: Operation::Combine(operation),
            buffers,
            grid: Grid { x: extent, y: Extent::Fixed(1) },
        }
    }

    /// One step for each segment.
    fn gemm(&self, steps: &mut Vec<Step>, gemm: &Gemm<'_>, gemv: bool, shared: &Shared) -> Result<()> {
        let Gemm { name, part, rows, input: (input_buffer, input, input_divisor), placed, activation, out } = *gemm;
        let matrix = &self.schedule.matrices[placed.matrix];
        let limit = self.facts.max_workgroups as usize;
        for (segment, &(codes, spans)) in placed.buffers.iter().enumerate() {
            let span_rows = matrix.max_span_rows(segment);
            let (variant, grid) = if gemv {
                let lanes = (matrix.vecs_per_row() as u32).next_power_of_two().min(GEMV_LANES);
                let tile_rows = GEMV_WORKGROUP / lanes * GEMV_ROWS_PER_LANE;
                let items = match rows {
                    RowSource::Direct => 1,
                    RowSource::Routed { top_k, num_experts: _ } => top_k,
                };
                let variant = GemmVariant::Gemv { workgroup_size: GEMV_WORKGROUP, lanes, tile_rows };
                let x = Extent::Fixed(span_rows.div_ceil(tile_rows as usize));
                (variant, Grid { x, y: Extent::PerToken { items, per: 1, limit } })
            } else {
                let y = match rows {
                    RowSource::Direct => Extent::PerToken { items: 1, per: TILE_ROWS, limit },
                    RowSource::Routed { top_k, num_experts } => Extent::Tiles(Permute { num_experts, top_k }),
                };
                (GemmVariant::Tiled, Grid { x: Extent::Fixed(span_rows.div_ceil(TILE_COLS)), y })
            };
            let operation = Operation::GroupedGemm(GroupedGemm {
                rows,
                variant,
                input,
                input_divisor,
                matrix_rows: matrix.rows,
                cols: matrix.cols,
                format: matrix.format,
                pair: matrix.pair,
                bias: matrix.bias,
                activation,
            });
            let buffer_of = |binding: &str| match (binding, shared.permuted) {
                ("params", _) => Some(shared.params),
                ("rows", _) => Some(input_buffer),
                ("segment", _) => Some(codes),
                ("spans", _) => Some(spans),
                ("out", _) => Some(out),
                ("topk_ids", _) => Some(shared.topk_ids),
                ("expert_slots", Some((expert_slots, _, _))) => Some(expert_slots),
                ("sorted_rows", Some((_, sorted_rows, _))) => Some(sorted_rows),
                ("tiles", Some((_, _, tiles))) => Some(tiles),
                (_, _) => None,
            };
            let bindings = operation.source().bindings;
            debug_assert!(bindings.iter().filter(|binding| binding.access != Access::Uniform).count() <= 8);
            let buffers = bindings.iter().filter_map(|binding| buffer_of(binding.name)).collect();
            let name = if placed.buffers.len() == 1 { name.to_string() } else { format!("{name}[{segment}]") };
            steps.push(Step { name, part, operation, buffers, grid });
        }
        Ok(())
    }
}

/// Workgroup memory that every WebGPU device has.
const WORKGROUP_BYTES: usize = 16 << 10;
/// Invocations of a gemv workgroup: the more, the more matrix rows share one staging of x.
const GEMV_WORKGROUP: u32 = 256;
/// Most invocations that share a matrix row.
const GEMV_LANES: u32 = 64;
/// Matrix rows whose sums one invocation holds.
const GEMV_ROWS_PER_LANE: u32 = 4;

/// Tokens whose activations fit the device's bindings.
fn chunk_tokens(spec: &MoeSpec, scope: Scope, max_tokens: usize, facts: &DeviceFacts) -> Result<usize> {
    // Chunks of 128 tokens begin at multiples of 256 bytes whatever a token has, as bindings must.
    const GRANULE: usize = 128;
    let limit = usize::try_from(facts.max_binding_bytes.min(1 << 31)).unwrap_or(usize::MAX);
    let mut per_token = vec![("hidden_size", 4 * spec.hidden_size), ("num_experts", 4 * spec.router_outputs())];
    if scope == Scope::Layer {
        per_token.push(("top_k * hidden_size", 4 * spec.top_k * spec.hidden_size));
        per_token.push(("top_k * intermediate_size", 4 * spec.top_k * spec.experts.intermediate_size));
        if let Some(SharedExperts { mlp, gate: _, combination: _ }) = &spec.shared {
            per_token.push(("shared.intermediate_size", 4 * mlp.intermediate_size));
        }
    }
    // The routing has a workgroup a token, the tiled GEMM one a tile.
    let workgroups = facts.max_workgroups as usize;
    let tiled = workgroups.saturating_sub(spec.num_experts) * TILE_ROWS / spec.top_k;
    let mut chunk = max_tokens.min(workgroups).min(tiled);
    if chunk < GRANULE.min(max_tokens) {
        let because = format!("{GRANULE} tokens need more than {workgroups} workgroups");
        return Err(refuse(facts.backend, "top_k", &spec.top_k, because).into());
    }
    for (field, bytes) in per_token {
        let fits = limit / bytes;
        if fits < GRANULE.min(max_tokens) {
            return Err(refuse(
                facts.backend,
                field,
                &(bytes / 4),
                format!("the activations of {GRANULE} tokens exceed a binding of {limit} bytes"),
            )
            .into());
        }
        chunk = chunk.min(fits);
    }
    Ok(if chunk < max_tokens { chunk / GRANULE * GRANULE } else { chunk })
}
