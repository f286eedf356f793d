//! `lower`: from a spec and a device's facts to the steps that compute the layer.
//!
//! Buffers and matrices are laid out once, each step is drafted once; every bucket then turns the drafts
//! into dispatches of its own kernels.
//!
//! A long file: the layer's steps in their order, one place to read what follows what.

use super::{Bucket, Buffer, Contents, DeviceFacts, Extent, Grid, Options, Part, Schedule, Step, Table};
use crate::error::{Error, Result, Unsupported};
use crate::kernels::combine::{Routed, SharedFactor, SharedRows};
use crate::kernels::grouped_gemm::{TILE_COLS, TILE_ROWS};
use crate::kernels::pack::{PackedMatrix, SPAN_WORDS};
use crate::kernels::{
    Access, Combine, Epilogue, GemmVariant, GroupedGemm, Norm, NormScale, Operation, Permute, RowSource, TopkRouting,
};
use crate::spec::{
    CombineRounding, ExpertInput, ExpertMlp, FloatType, Latent, LatentNorm, LogitTransform, MoeSpec, OutputNorm,
    Precision, Rounding, Router, RouterInput, Routing, RoutingMethod, SharedCombination, SharedExperts, SharedGate,
    WeightFormat, WeightPosition, ZeroExpertKind, ZeroExperts,
};
use crate::support::{self, Scope, refuse};

/// Workgroup memory that every WebGPU device has.
const WORKGROUP_BYTES: usize = 16 << 10;
/// Invocations of a gemv workgroup: the more, the more matrix rows share one staging of x.
const GEMV_WORKGROUP: u32 = 256;
/// Most invocations that share a matrix row.
const GEMV_LANES: u32 = 64;
/// Matrix rows whose sums one invocation holds.
const GEMV_ROWS_PER_LANE: u32 = 4;

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
    let MoeSpec {
        hidden_size: _,
        num_experts: _,
        top_k: _,
        router,
        routing: _,
        experts,
        shared,
        latent,
        lora: _,
        expert_input: _,
        output_bias: _,
        output_norm: _,
        placement: _,
        shard: _,
        entry: _,
        precision: _,
    } = spec;
    match router {
        Router::Linear { input: _, format, bias: _, transform: _ }
        | Router::Mlp { state_size: _, rms_norm_eps: _, previous_state: _, format } => {
            scales_by_vector(backend, "router.format", *format)?;
        }
        Router::Given { transform: _ } => {}
    }
    if scope == Scope::Routing {
        return Ok(());
    }
    scales_by_vector(backend, "experts.format", experts.format)?;
    if let Some(SharedExperts { mlp, gate, combination: _ }) = shared {
        scales_by_vector(backend, "shared.mlp.format", mlp.format)?;
        match gate {
            SharedGate::None | SharedGate::Joint => {}
            SharedGate::Sigmoid { format } => scales_by_vector(backend, "shared.gate.format", *format)?,
        }
    }
    match latent {
        None => Ok(()),
        Some(Latent { size: _, format, norm: _ }) => scales_by_vector(backend, "latent.format", *format),
    }
}

/// The GEMM kernels look a scale up once for each vector of 16 codes.
fn scales_by_vector(backend: &'static str, field: &'static str, format: WeightFormat) -> Result<(), Unsupported> {
    match format {
        WeightFormat::Fp8Block { block: [_, columns], scale: _ } if columns % 16 != 0 => {
            Err(refuse(backend, field, &format, "block columns must be a multiple of 16"))
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
    params: usize,
    drafts: Vec<Draft>,
}

/// A step before a bucket picks its kernel.
enum Draft {
    /// One dispatch for each segment.
    Gemm(Gemm),
    /// The same in every bucket.
    Step(Step),
    /// Only where GEMMs are tiled.
    Permute(Step),
}

/// One GEMM before it is cut into segments and variants.
struct Gemm {
    name: &'static str,
    part: Part,
    rows: RowSource,
    input: Rows,
    input_divisor: usize,
    weigh_input: Option<Rounding>,
    placed: Placed,
    epilogue: Epilogue,
    out: usize,
    /// Buffers of the bindings that only some GEMMs have.
    others: Vec<(&'static str, usize)>,
}

/// A buffer of rows and the type of its values.
#[derive(Clone, Copy)]
struct Rows {
    buffer: usize,
    float_type: FloatType,
}

/// The indices of a packed matrix in the schedule.
struct Placed {
    matrix: usize,
    /// (segment buffer, span buffer) of each segment.
    buffers: Vec<(usize, usize)>,
}

/// What the routing leaves to the experts.
struct RoutedBuffers {
    topk_ids: usize,
    topk_weights: usize,
    shared_weights: Option<usize>,
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
        let mut lowering = Self { spec, facts, options, schedule, params: 0, drafts: vec![] };
        lowering.params = lowering.buffer("params", Contents::Params, 16);
        Ok(lowering)
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

    /// f32 rows of one chunk.
    fn scratch(&mut self, name: &str, values_per_token: usize) -> usize {
        self.buffer(name, Contents::Scratch, self.schedule.chunk_tokens * values_per_token * 4)
    }

    fn table(&mut self, name: &str, table: Table, words: usize) -> usize {
        self.buffer(name, Contents::Table(table), words * 4)
    }

    fn place(
        &mut self,
        name: &'static str,
        groups: usize,
        [rows, cols]: [usize; 2],
        format: WeightFormat,
        pair: usize,
        bias: bool,
    ) -> Result<Placed, Unsupported> {
        let matrix = PackedMatrix { name, groups, rows, cols, format, pair, bias, segments: vec![] };
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

    /// One of the plain products of a token's row: router, projections, gates.
    #[allow(clippy::too_many_arguments, reason = "each is a part of the product's own description")]
    fn project(
        &mut self,
        name: &'static str,
        part: Part,
        input: Rows,
        shape: [usize; 2],
        format: WeightFormat,
        bias: bool,
        epilogue: Epilogue,
        out: usize,
        others: Vec<(&'static str, usize)>,
    ) -> Result<()> {
        let placed = self.place(name, 1, shape, format, 1, bias)?;
        self.drafts.push(Draft::Gemm(Gemm {
            name,
            part,
            rows: RowSource::Direct { groups: 1 },
            input,
            input_divisor: 1,
            weigh_input: None,
            placed,
            epilogue,
            out,
            others,
        }));
        Ok(())
    }

    fn norm(
        &mut self,
        name: &'static str,
        part: Part,
        norm: Norm,
        rows: usize,
        scale: usize,
        out: usize,
    ) -> Result<()> {
        let limit = self.facts.max_workgroups as usize;
        let x = Extent::PerToken { items: norm.rows_per_token, per: 1, limit };
        let buffers = [("rows", rows), ("scale_vector", scale), ("out", out)];
        let step = self.step(name, part, Operation::Norm(norm), Grid { x, y: Extent::Fixed(1) }, &buffers)?;
        self.drafts.push(Draft::Step(step));
        Ok(())
    }

    /// A step whose bindings find their buffers by name.
    fn step(
        &self,
        name: impl Into<String>,
        part: Part,
        operation: Operation,
        grid: Grid,
        buffers: &[(&'static str, usize)],
    ) -> Result<Step> {
        let name = name.into();
        let bindings = operation.source().bindings;
        debug_assert!(bindings.iter().filter(|binding| binding.access != Access::Uniform).count() <= 8);
        let find = |binding: &'static str| {
            let found = buffers.iter().find(|(name, _)| *name == binding).map(|(_, buffer)| *buffer);
            let params = (binding == "params").then_some(self.params);
            found.or(params).ok_or_else(|| {
                Error::invalid(binding, "no buffer", format!("one for {name}"), "this is a fault of lower")
            })
        };
        let buffers = bindings.iter().map(|binding| find(binding.name)).collect::<Result<_>>()?;
        Ok(Step { name, part, operation, buffers, grid })
    }

    fn buckets(&mut self) -> Result<()> {
        let hidden_size = self.spec.hidden_size;
        let input = self.spec.precision.input;
        let hidden_states = Rows {
            buffer: self.token_buffer("hidden_states", Contents::HiddenStates, hidden_size * input.bytes()),
            float_type: input,
        };
        let routed = self.routing(hidden_states)?;
        if self.schedule.scope == Scope::Layer {
            self.layer(hidden_states, &routed)?;
        }
        let chunk = self.schedule.chunk_tokens;
        // The matrix-vector kernel has a workgroup a row.
        let rows_per_token = self.spec.top_k.max(self.spec.shared_mlps());
        let decode_tokens =
            self.options.decode_tokens.min(chunk).min(self.facts.max_workgroups as usize / rows_per_token);
        for (tokens, gemv) in [(decode_tokens, true), (chunk, false)] {
            if tokens == 0 || (!gemv && decode_tokens == chunk) {
                continue;
            }
            let mut steps = vec![];
            for draft in &self.drafts {
                match draft {
                    Draft::Gemm(gemm) => self.gemm(&mut steps, gemm, gemv)?,
                    Draft::Step(step) => steps.push(step.clone()),
                    Draft::Permute(_) if gemv => {}
                    Draft::Permute(step) => steps.push(step.clone()),
                }
            }
            self.check_limits(&steps, tokens)?;
            self.schedule.buckets.push(Bucket { max_tokens: tokens, steps });
        }
        Ok(())
    }

    fn check_limits(&self, steps: &[Step], tokens: usize) -> Result<(), Unsupported> {
        for step in steps {
            let memory = step.operation.workgroup_bytes();
            if memory > WORKGROUP_BYTES {
                let because =
                    format!("step {} needs {memory} of {WORKGROUP_BYTES} bytes of workgroup memory", step.name);
                let field = "num_experts, top_k or n_group";
                return Err(refuse(self.facts.backend, field, &self.spec.num_experts, because));
            }
            let largest = step.grid.workgroups(tokens).into_iter().max().unwrap_or(0);
            if largest > self.facts.max_workgroups {
                let because = format!("step {} needs more than {} workgroups", step.name, self.facts.max_workgroups);
                let field = "hidden_size or intermediate_size";
                return Err(refuse(self.facts.backend, field, &largest, because));
            }
        }
        Ok(())
    }

    /// Hidden states to ids and weights.
    fn routing(&mut self, hidden_states: Rows) -> Result<RoutedBuffers> {
        let part = Part::Routing;
        let MoeSpec {
            hidden_size,
            num_experts,
            top_k,
            router,
            routing,
            experts: _,
            shared: _,
            latent: _,
            lora: _,
            expert_input: _,
            output_bias: _,
            output_norm: _,
            placement: _,
            shard: _,
            entry: _,
            precision,
        } = self.spec;
        let (hidden_size, top_k, outputs) = (*hidden_size, *top_k, self.spec.router_outputs());
        let topk_ids = self.token_buffer("topk_ids", Contents::TopkIds, top_k * 4);
        let topk_weights = self.token_buffer("topk_weights", Contents::TopkWeights, top_k * 4);
        let (logits, transform) = match *router {
            Router::Linear { input, format, bias, transform } => {
                let rows = match input {
                    RouterInput::Hidden => hidden_states,
                    RouterInput::RmsNormScaled { eps } => {
                        let scale = self.table("router_input_scale", Table::RouterInputScale, hidden_size);
                        let out = self.scratch("router_input", hidden_size);
                        let norm = Norm {
                            rows_per_token: 1,
                            cols: hidden_size,
                            input: hidden_states.float_type,
                            eps,
                            scale: NormScale::After,
                            factor: 1.0 / (hidden_size as f32).sqrt(),
                        };
                        self.norm("router_norm", part, norm, hidden_states.buffer, scale, out)?;
                        Rows { buffer: out, float_type: FloatType::F32 }
                    }
                };
                let logits = self.scratch("logits", outputs);
                let shape = [outputs, hidden_size];
                self.project("router_gemm", part, rows, shape, format, bias, Epilogue::Sums, logits, vec![])?;
                (logits, transform)
            }
            Router::Mlp { state_size, rms_norm_eps, previous_state, format } => {
                let logits = self.router_mlp(hidden_states, state_size, rms_norm_eps, previous_state, format)?;
                (logits, LogitTransform::None)
            }
            Router::Given { transform } => {
                (self.token_buffer("given_logits", Contents::GivenLogits, outputs * 4), transform)
            }
        };
        let Routing {
            method,
            renormalize,
            routed_scaling_factor,
            apply_routed_scale_to_output,
            per_expert_scale,
            weight_position: _,
            zero_experts,
            nan_policy,
        } = routing;
        let mut buffers = vec![("logits", logits), ("topk_ids", topk_ids), ("topk_weights", topk_weights)];
        if self.spec.has_selection_bias() {
            let words = self.spec.selectable();
            buffers.push(("selection_bias", self.table("selection_bias", Table::SelectionBias, words)));
        }
        if *per_expert_scale {
            buffers.push(("per_expert_scale", self.table("per_expert_scale", Table::PerExpertScale, *num_experts)));
        }
        let mut shared_weights = None;
        match *method {
            RoutingMethod::Hash { score: _, vocab_size } => {
                buffers.push(("token_ids", self.token_buffer("token_ids", Contents::TokenIds, 4)));
                buffers.push(("tid2eid", self.table("tid2eid", Table::Tid2eid, vocab_size * top_k)));
            }
            RoutingMethod::JointNorm { num_shared, global_scale } => {
                let shares = self.token_buffer("shared_weights", Contents::SharedWeights, num_shared * 4);
                shared_weights = Some(shares);
                buffers.push(("shared_weights", shares));
                if global_scale {
                    buffers.push(("global_scales", self.table("global_scale", Table::GlobalScale, 1)));
                }
            }
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => {}
        }
        let operation = Operation::TopkRouting(TopkRouting {
            num_experts: *num_experts,
            selectable: self.spec.selectable(),
            router_outputs: outputs,
            top_k,
            logits: precision.rounded(precision.router_gemm),
            transform,
            method: method.clone(),
            renormalize: *renormalize,
            per_expert_scale: *per_expert_scale,
            weight_scale: if *apply_routed_scale_to_output { 1.0 } else { *routed_scaling_factor },
            zero_experts_skip: match zero_experts {
                Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) => true,
                Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity }) | None => false,
            },
            nan_policy: *nan_policy,
            weights: precision.rounded(precision.routing_weights),
        });
        let limit = self.facts.max_workgroups as usize;
        let grid = Grid { x: Extent::Fixed(1), y: Extent::PerToken { items: 1, per: 1, limit } };
        let step = self.step("topk_routing", part, operation, grid, &buffers)?;
        self.drafts.push(Draft::Step(step));
        Ok(RoutedBuffers { topk_ids, topk_weights, shared_weights })
    }

    /// The layers of a router with state, to its logits.
    fn router_mlp(
        &mut self,
        hidden_states: Rows,
        state_size: usize,
        eps: f32,
        previous_state: bool,
        format: WeightFormat,
    ) -> Result<usize> {
        let part = Part::Routing;
        let f32_rows = |buffer| Rows { buffer, float_type: FloatType::F32 };
        let (outputs, state) = (self.spec.router_outputs(), 4 * state_size);
        let states = self.token_buffer("router_states", Contents::RouterStates, state);
        let (epilogue, others) = match previous_state {
            true => {
                let previous = self.token_buffer("previous_router_states", Contents::PreviousRouterStates, state);
                let scale = self.table("router_states_scale", Table::RouterStatesScale, state_size);
                (Epilogue::AddState, vec![("previous_router_states", previous), ("router_states_scale", scale)])
            }
            false => (Epilogue::Sums, vec![]),
        };
        let shape = [state_size, self.spec.hidden_size];
        self.project("router.down", part, hidden_states, shape, format, true, epilogue, states, others)?;
        let weight = self.table("router_norm", Table::RouterNorm, state_size);
        let normed = self.scratch("router_normed", state_size);
        let norm = Norm {
            rows_per_token: 1,
            cols: state_size,
            input: FloatType::F32,
            eps,
            scale: NormScale::After,
            factor: 1.0,
        };
        self.norm("router_norm", part, norm, states, weight, normed)?;
        let (inner, square) = (self.scratch("router_inner", state_size), [state_size, state_size]);
        let gelu = Epilogue::GeluErf;
        self.project("router.fc1", part, f32_rows(normed), square, format, true, gelu, inner, vec![])?;
        // The second layer writes over what the first has read.
        self.project("router.fc2", part, f32_rows(inner), square, format, true, gelu, normed, vec![])?;
        let logits = self.scratch("logits", outputs);
        let shape = [outputs, state_size];
        self.project("router.out", part, f32_rows(normed), shape, format, false, Epilogue::Sums, logits, vec![])?;
        Ok(logits)
    }

    /// Ids and weights to the output.
    fn layer(&mut self, hidden_states: Rows, routed: &RoutedBuffers) -> Result<()> {
        let part = Part::Experts;
        let MoeSpec {
            hidden_size,
            num_experts,
            top_k,
            router: _,
            routing,
            experts,
            shared,
            latent,
            lora: _,
            expert_input,
            output_bias,
            output_norm,
            placement: _,
            shard: _,
            entry: _,
            precision,
        } = self.spec;
        let (hidden_size, num_experts, top_k) = (*hidden_size, *num_experts, *top_k);
        let Precision {
            input,
            output,
            model,
            router_gemm: _,
            routing_weights: _,
            weighted_input,
            gate_up: _,
            activation: _,
            combine,
            combine_order,
            block_scale: _,
        } = *precision;
        let width = self.spec.expert_width();
        let RoutedBuffers { topk_ids, topk_weights, shared_weights } = *routed;
        let f32_rows = |buffer| Rows { buffer, float_type: FloatType::F32 };
        let x = match expert_input {
            ExpertInput::Hidden => hidden_states,
            ExpertInput::Separate => {
                let bytes = hidden_size * input.bytes();
                let buffer = self.token_buffer("expert_hidden_states", Contents::ExpertHiddenStates, bytes);
                Rows { buffer, float_type: input }
            }
        };
        let expert_slots = self.table("expert_slots", Table::ExpertSlots, num_experts);
        let rows = self.schedule.chunk_tokens * top_k;
        let sorted_rows = self.scratch("sorted_rows", top_k);
        let permute = Permute { num_experts, top_k };
        let tiles = self.buffer("tiles", Contents::Scratch, (1 + permute.max_tiles(rows)) * 16);
        let grid = Grid { x: Extent::Fixed(num_experts), y: Extent::Fixed(1) };
        let buffers = [("topk_ids", topk_ids), ("sorted_rows", sorted_rows), ("tiles", tiles)];
        let step = self.step("permute", part, Operation::Permute(permute), grid, &buffers)?;
        self.drafts.push(Draft::Permute(step));

        // What the routed experts read.
        let norm_of = |rows_per_token, eps, scale| Norm {
            rows_per_token,
            cols: width,
            input: FloatType::F32,
            eps,
            scale,
            factor: 1.0,
        };
        let mut entering = x;
        if let Some(Latent { size, format, norm }) = latent {
            let out = self.scratch("latent", *size);
            let shape = [*size, hidden_size];
            self.project("latent.down", part, x, shape, *format, false, Epilogue::Sums, out, vec![])?;
            entering = f32_rows(out);
            match norm {
                LatentNorm::None | LatentNorm::Reduced { eps: _ } => {}
                LatentNorm::PreAndPost { pre_eps, post_eps: _ } => {
                    let weight = self.table("latent_pre_norm", Table::LatentPreNorm, *size);
                    let normed = self.scratch("latent_normed", *size);
                    let norm = norm_of(1, *pre_eps, NormScale::After);
                    self.norm("latent.pre_norm", part, norm, out, weight, normed)?;
                    entering = f32_rows(normed);
                }
            }
        }

        // The routed experts.
        let (weigh_input, weighted_hidden, weighted_output) = match routing.weight_position {
            WeightPosition::Output => (None, false, true),
            WeightPosition::Input => (Some(weighted_input), false, false),
            WeightPosition::BeforeDown => (None, true, false),
        };
        let source = RowSource::Routed { top_k, num_experts };
        let others = vec![
            ("topk_ids", topk_ids),
            ("topk_weights", topk_weights),
            ("expert_slots", expert_slots),
            ("sorted_rows", sorted_rows),
            ("tiles", tiles),
        ];
        let mlp = Mlp {
            names: ["experts.gate_up", "experts.down"],
            mlp: experts,
            width,
            groups: num_experts,
            rows: source,
            rows_per_token: top_k,
            weigh_input,
            weighted_hidden,
            scratch: ["hidden", "expert_out"],
        };
        let mut expert_out = self.mlp(&mlp, entering, &others)?;
        match latent {
            None | Some(Latent { size: _, format: _, norm: LatentNorm::None | LatentNorm::Reduced { eps: _ } }) => {}
            Some(Latent { size, format: _, norm: LatentNorm::PreAndPost { pre_eps: _, post_eps } }) => {
                let weight = self.table("latent_post_norm", Table::LatentPostNorm, *size);
                let normed = self.scratch("expert_normed", top_k * size);
                let norm = norm_of(top_k, *post_eps, NormScale::Before);
                self.norm("latent.post_norm", part, norm, expert_out, weight, normed)?;
                expert_out = normed;
            }
        }

        // The shared experts.
        let mut shared_buffers = vec![];
        let mut shared_rows = None;
        if let Some(SharedExperts { mlp, gate, combination }) = shared {
            let mlps = self.spec.shared_mlps();
            let mlp = Mlp {
                names: ["shared.gate_up", "shared.down"],
                mlp,
                width: hidden_size,
                groups: mlps,
                rows: RowSource::Direct { groups: mlps },
                rows_per_token: mlps,
                weigh_input: None,
                weighted_hidden: false,
                scratch: ["shared_hidden", "shared_out"],
            };
            shared_buffers.push(("shared_out", self.mlp(&mlp, x, &[])?));
            let factor = match gate {
                SharedGate::None => SharedFactor::One,
                SharedGate::Sigmoid { format } => {
                    let out = self.scratch("shared_gate", 1);
                    let shape = [1, hidden_size];
                    self.project("shared.gate", part, x, shape, *format, false, Epilogue::Sums, out, vec![])?;
                    shared_buffers.push(("shared_gate", out));
                    SharedFactor::SigmoidOfGate
                }
                SharedGate::Joint => {
                    shared_buffers.extend(shared_weights.map(|buffer| ("shared_weights", buffer)));
                    SharedFactor::Share
                }
            };
            let average = match combination {
                SharedCombination::Sum => false,
                SharedCombination::Average => true,
            };
            shared_rows = Some(SharedRows { mlps, factor, average });
        }

        // Their sums.
        let rho = routing.routed_scaling_factor;
        let slots = Combine {
            hidden_size: width,
            routed: Routed::Slots {
                num_experts,
                selectable: self.spec.selectable(),
                top_k,
                weighted: weighted_output,
                identity: match routing.zero_experts {
                    Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity }) => Some(x.float_type),
                    Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) | None => None,
                },
                order: combine_order,
            },
            output_scale: if routing.apply_routed_scale_to_output { rho } else { 1.0 },
            output_bias: false,
            shared: None,
            rounding: combine,
            model,
            output: FloatType::F32,
        };
        let routed_buffers = [("topk_ids", topk_ids), ("topk_weights", topk_weights), ("rows", x.buffer)];
        let mut last = Combine { output_bias: *output_bias, shared: shared_rows, output, ..slots.clone() };
        if let Some(Latent { size, format, norm }) = latent {
            let mut reduced = self.scratch("reduced", *size);
            let mut buffers = routed_buffers.to_vec();
            buffers.extend([("expert_out", expert_out), ("out", reduced)]);
            self.combine("reduce", slots, &buffers)?;
            match norm {
                LatentNorm::None | LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => {}
                LatentNorm::Reduced { eps } => {
                    let weight = self.table("latent_norm", Table::LatentReducedNorm, *size);
                    let normed = self.scratch("reduced_normed", *size);
                    self.norm("latent.norm", part, norm_of(1, *eps, NormScale::After), reduced, weight, normed)?;
                    reduced = normed;
                }
            }
            let up = self.scratch("latent_up", hidden_size);
            let shape = [hidden_size, *size];
            self.project("latent.up", part, f32_rows(reduced), shape, *format, false, Epilogue::Sums, up, vec![])?;
            expert_out = up;
            last = Combine { hidden_size, routed: Routed::Row, output_scale: 1.0, ..last };
        }
        let mut buffers = routed_buffers.to_vec();
        buffers.push(("expert_out", expert_out));
        buffers.extend(shared_buffers);
        if *output_bias {
            buffers.push(("output_bias", self.table("output_bias", Table::OutputBias, hidden_size)));
        }
        let out = self.token_buffer("output", Contents::Output, hidden_size * output.bytes());
        let Some(OutputNorm { eps }) = *output_norm else {
            buffers.push(("out", out));
            return self.combine("combine", last, &buffers);
        };
        let (sum, normed) = (self.scratch("joined", hidden_size), self.scratch("joined_normed", hidden_size));
        buffers.push(("out", sum));
        let joined = Combine { output: FloatType::F32, ..last };
        // What is left is the cast to the output type.
        let cast = Combine {
            routed: Routed::Row,
            output_scale: 1.0,
            output_bias: false,
            shared: None,
            rounding: CombineRounding::F32,
            output,
            ..joined.clone()
        };
        self.combine("combine", joined, &buffers)?;
        let weight = self.table("output_norm", Table::OutputNorm, hidden_size);
        let norm = Norm { cols: hidden_size, ..norm_of(1, eps, NormScale::After) };
        self.norm("output_norm", part, norm, sum, weight, normed)?;
        self.combine("output", cast, &[("expert_out", normed), ("out", out)])
    }

    fn combine(&mut self, name: &'static str, combine: Combine, buffers: &[(&'static str, usize)]) -> Result<()> {
        // 64 invocations a workgroup, one word each; beyond the limit the kernel strides.
        let extent = Extent::PerToken { items: combine.hidden_size, per: 64, limit: 8192 };
        let grid = Grid { x: extent, y: Extent::Fixed(1) };
        let step = self.step(name, Part::Experts, Operation::Combine(combine), grid, buffers)?;
        self.drafts.push(Draft::Step(step));
        Ok(())
    }

    /// Both GEMMs of one MLP a group; the buffer of its rows.
    fn mlp(&mut self, mlp: &Mlp<'_>, input: Rows, others: &[(&'static str, usize)]) -> Result<usize> {
        let Mlp { names, mlp, width, groups, rows, rows_per_token, weigh_input, weighted_hidden, scratch } = *mlp;
        let ExpertMlp {
            intermediate_size,
            activation,
            gate_up_layout: _, // a matter of how the checkpoint is read
            orientation: _,    // likewise
            gate_up_bias,
            down_bias,
            format,
            activation_quant: _, // refused by `landed`
        } = *mlp;
        let pair = if activation.gated() { 2 } else { 1 };
        let shape = [pair * intermediate_size, width];
        let gate_up = self.place(names[0], groups, shape, format, pair, gate_up_bias)?;
        let down = self.place(names[1], groups, [width, intermediate_size], format, 1, down_bias)?;
        let hidden = self.scratch(scratch[0], rows_per_token * intermediate_size);
        let out = self.scratch(scratch[1], rows_per_token * width);
        let epilogue = Epilogue::Activation {
            activation,
            gate_up: self.spec.precision.gate_up,
            rounding: self.spec.precision.activation,
            weighted: weighted_hidden,
        };
        let part = Part::Experts;
        self.drafts.push(Draft::Gemm(Gemm {
            name: names[0],
            part,
            rows,
            input,
            input_divisor: rows_per_token,
            weigh_input,
            placed: gate_up,
            epilogue,
            out: hidden,
            others: others.to_vec(),
        }));
        self.drafts.push(Draft::Gemm(Gemm {
            name: names[1],
            part,
            rows,
            input: Rows { buffer: hidden, float_type: FloatType::F32 },
            input_divisor: 1,
            weigh_input: None,
            placed: down,
            epilogue: Epilogue::Sums,
            out,
            others: others.to_vec(),
        }));
        Ok(out)
    }

    /// One step for each segment.
    fn gemm(&self, steps: &mut Vec<Step>, gemm: &Gemm, gemv: bool) -> Result<()> {
        let Gemm { name, part, rows, input, input_divisor, weigh_input, ref placed, epilogue, out, ref others } = *gemm;
        let matrix = &self.schedule.matrices[placed.matrix];
        let limit = self.facts.max_workgroups as usize;
        for (segment, &(codes, spans)) in placed.buffers.iter().enumerate() {
            let span_rows = matrix.max_span_rows(segment);
            let (variant, grid) = if gemv {
                let lanes = (matrix.vecs_per_row() as u32).next_power_of_two().min(GEMV_LANES);
                let tile_rows = GEMV_WORKGROUP / lanes * GEMV_ROWS_PER_LANE;
                let items = match rows {
                    RowSource::Direct { groups } => groups,
                    RowSource::Routed { top_k, num_experts: _ } => top_k,
                };
                let variant = GemmVariant::Gemv { workgroup_size: GEMV_WORKGROUP, lanes, tile_rows };
                let x = Extent::Fixed(span_rows.div_ceil(tile_rows as usize));
                (variant, Grid { x, y: Extent::PerToken { items, per: 1, limit } })
            } else {
                let y = match rows {
                    RowSource::Direct { groups } => Extent::GroupTiles(groups),
                    RowSource::Routed { top_k, num_experts } => Extent::Tiles(Permute { num_experts, top_k }),
                };
                (GemmVariant::Tiled, Grid { x: Extent::Fixed(span_rows.div_ceil(TILE_COLS)), y })
            };
            let operation = Operation::GroupedGemm(GroupedGemm {
                rows,
                variant,
                input: input.float_type,
                input_divisor,
                weigh_input,
                matrix_rows: matrix.rows,
                cols: matrix.cols,
                format: matrix.format,
                pair: matrix.pair,
                bias: matrix.bias,
                epilogue,
                model: self.spec.precision.model,
            });
            let mut buffers = vec![("rows", input.buffer), ("segment", codes), ("spans", spans), ("out", out)];
            buffers.extend(others);
            let name = if placed.buffers.len() == 1 { name.to_string() } else { format!("{name}[{segment}]") };
            steps.push(self.step(name, part, operation, grid, &buffers)?);
        }
        Ok(())
    }
}

/// One MLP a group, as the layer uses it.
#[derive(Clone, Copy)]
struct Mlp<'a> {
    /// Of the two matrices.
    names: [&'static str; 2],
    mlp: &'a ExpertMlp,
    /// Width of its input and output.
    width: usize,
    groups: usize,
    rows: RowSource,
    rows_per_token: usize,
    weigh_input: Option<Rounding>,
    weighted_hidden: bool,
    /// Names of the activation's and of the output's buffers.
    scratch: [&'static str; 2],
}

/// Tokens whose activations fit the device's bindings.
fn chunk_tokens(spec: &MoeSpec, scope: Scope, max_tokens: usize, facts: &DeviceFacts) -> Result<usize> {
    // Chunks of 128 tokens begin at multiples of 256 bytes whatever a token has, as bindings must.
    const GRANULE: usize = 128;
    let limit = usize::try_from(facts.max_binding_bytes.min(1 << 31)).unwrap_or(usize::MAX);
    let mut per_token = vec![("hidden_size", 4 * spec.hidden_size), ("num_experts", 4 * spec.router_outputs())];
    match spec.router {
        Router::Mlp { state_size, rms_norm_eps: _, previous_state: _, format: _ } => {
            per_token.push(("router.state_size", 4 * state_size));
        }
        Router::Linear { input: _, format: _, bias: _, transform: _ } | Router::Given { transform: _ } => {}
    }
    let mut rows_per_token = spec.top_k;
    if scope == Scope::Layer {
        per_token.push(("top_k * hidden_size", 4 * spec.top_k * spec.expert_width()));
        per_token.push(("top_k * intermediate_size", 4 * spec.top_k * spec.experts.intermediate_size));
        if let Some(SharedExperts { mlp, gate: _, combination: _ }) = &spec.shared {
            let mlps = spec.shared_mlps();
            rows_per_token = rows_per_token.max(mlps);
            per_token.push(("shared.hidden_size", 4 * mlps * spec.hidden_size));
            per_token.push(("shared.intermediate_size", 4 * mlps * mlp.intermediate_size));
        }
    }
    // The routing has a workgroup a token, the tiled GEMM one a tile.
    let workgroups = facts.max_workgroups as usize;
    let tiled = workgroups.saturating_sub(spec.num_experts) * TILE_ROWS / rows_per_token;
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
