//! `lower`: from a spec and a device's facts to the steps that compute the layer.
//!
//! Buffers and matrices are laid out once, each step is drafted once; every bucket then turns the drafts
//! into dispatches of its own kernels.
//!
//! This file lays out and dispatches; `routing` and `layer` have the steps in their order.

mod layer;
mod routing;

use std::borrow::Cow;

use super::{
    Bucket, Buffer, Contents, Cut, Cuts, DIAGNOSTICS, Decision, DeviceFacts, EXPERT_MISSES, Extent, Gemms, Grid,
    LOAD_SLOT, Options, Pace, Part, Schedule, Step, Table, Units, quantize_by,
};
use crate::error::{Error, Result, Unsupported};
use crate::kernels::combine::{Routed, SharedFactor, SharedRows};
use crate::kernels::diagnose::clamps;
use crate::kernels::grouped_gemm::{TILE_COLS, TILE_ROWS, WGMMA_CODE_ROWS, mma_matrix_rows, wgmma_blocks};
use crate::kernels::pack::{PackedMatrix, SPAN_WORDS};
use crate::kernels::quantize::AMAX_PARTS;
use crate::kernels::{
    Access, Activate, Activated, Amax, Assign, AssignBy, Combine, Counted, Diagnose, Epilogue, ExpertSlots,
    GemmVariant, GroupedGemm, Matrices, Norm, NormScale, Operation, Permute, Quantize, RowScale, RowSource, RowValues,
    ScaleLayout, TopkRouting, ValueSource,
};
use crate::spec::{
    ActivationCode, ActivationQuant, ActivationRounding, ActivationScale, BlockScale, CombineRounding, Entry,
    ExpertInput, ExpertMlp, FloatType, Latent, LatentNorm, LogitTransform, Lora, LoraDelta, MoeSpec, OutputNorm,
    Placement, Precision, Rounding, Router, RouterInput, Routing, RoutingMethod, ScaleSpan, SharedCombination,
    SharedExperts, SharedGate, TensorShard, WeightFormat, WeightPosition, ZeroExpertKind, ZeroExperts,
};
use crate::support::{self, Scope, refuse};
use crate::weights::{Blocks, Parts};

/// Chunks of so many tokens begin at multiples of 256 bytes whatever a token has, as bindings must.
const GRANULE: usize = 128;
/// Workgroup memory that every WebGPU device has.
const WORKGROUP_BYTES: usize = 16 << 10;
/// Storage buffers that a kernel may bind on every WebGPU device.
const STORAGE_BUFFERS: usize = 8;
/// Invocations of a gemv workgroup: the more, the more matrix rows share one staging of x.
const GEMV_WORKGROUP: u32 = 256;
/// Most invocations that share a matrix row of a matrix with many.
const GEMV_LANES: u32 = 32;
/// Most invocations that share a matrix row, and some rows that meet it: pairs of groups of them read the same x.
const ROWS_LANES: u32 = 16;
/// Matrix rows below which more invocations share one, so that there are enough workgroups.
const FEW_MATRIX_ROWS: usize = 1024;
/// Tokens up to which matrix units cost more, by the permutation before them, than they save.
const UNITS_GEMV_TOKENS: usize = 2;
/// Matrix rows whose sums one invocation holds.
const GEMV_ROWS_PER_LANE: u32 = 4;

/// Turns a spec into the schedule of a device, for at most `max_tokens` tokens a call (rows of a batched entry, which
/// bound it as well).
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
    let max_tokens = match spec.entry {
        Entry::TokenMajor => max_tokens,
        // A row is a token here.
        Entry::Batched { capacity } => max_tokens.min(spec.num_slots() * capacity),
    };
    supported(spec, scope, facts.backend)?;
    let lowered = |chunk_tokens| {
        let most = (facts.matrix_units, true);
        let mut lowering = Lowering::new(spec, scope, max_tokens, chunk_tokens, facts, options, most);
        lowering.draft()?;
        let fitting = match lowering.fitting_units() {
            units @ Units::Warpgroups { multiprocessors: _ } => {
                (units, lowering.routed().all(|gemm| lowering.is_whole(gemm)))
            }
            units @ (Units::None | Units::Warps) => (units, true),
        };
        if most != fitting {
            // Tiles of the other kernels' own sizes.
            lowering = Lowering::new(spec, scope, max_tokens, chunk_tokens, facts, options, fitting);
            lowering.draft()?;
        }
        lowering.buckets()?;
        Ok::<_, Error>(lowering.schedule)
    };
    let mut schedule = lowered(chunk_tokens(spec, scope, max_tokens, facts, options)?)?;
    if let Some(Pace { longest, rates }) = options.pace {
        while schedule.chunk_tokens > GRANULE && schedule.longest_step(rates) > longest {
            let finer = (schedule.chunk_tokens / 2 / GRANULE * GRANULE).max(GRANULE);
            // One scale for all rows of a call cannot be had in chunks.
            let Ok(finer) = lowered(finer) else { break };
            schedule = finer;
        }
    }
    Ok(schedule)
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
        shard,
        common_terms: _,
        entry: _,
        precision: _,
    } = spec;
    match router {
        Router::Linear { input: _, format, bias: _, transform: _ }
        | Router::Mlp { state_size: _, rms_norm_eps: _, previous_state: _, format } => {
            scales_by_vector(backend, "router.format", *format, format.parts())?;
        }
        Router::Given { transform: _ } => {}
    }
    if scope == Scope::Routing {
        return Ok(());
    }
    let [gate_up, down] = shard_parts(experts.format, *shard).ok_or_else(|| {
        let because =
            format!("a column of {:?} can be cut from the rest only where a super-block ends", experts.format);
        refuse(backend, "shard", shard, because)
    })?;
    for parts in [gate_up, down] {
        scales_by_vector(backend, "experts.format", experts.format, parts)?;
        nested_scales(backend, "experts.activation_quant", experts, parts)?;
    }
    if let Some(SharedExperts { mlp, gate, combination: _ }) = shared {
        scales_by_vector(backend, "shared.mlp.format", mlp.format, mlp.format.parts())?;
        nested_scales(backend, "shared.mlp.activation_quant", mlp, mlp.format.parts())?;
        match gate {
            SharedGate::None | SharedGate::Joint => {}
            SharedGate::Sigmoid { format } => scales_by_vector(backend, "shared.gate.format", *format, format.parts())?,
        }
    }
    match latent {
        None => Ok(()),
        Some(Latent { size: _, format, norm: _ }) => {
            scales_by_vector(backend, "latent.format", *format, format.parts())
        }
    }
}

/// The GEMM kernels look a scale up once for each vector, or half a vector of 4-bit codes.
fn scales_by_vector(
    backend: &'static str,
    field: &'static str,
    format: WeightFormat,
    parts: Parts,
) -> Result<(), Unsupported> {
    match parts.blocks {
        Some(Blocks { rows: _, cols: Some(columns), scale: _, act_order: false }) if columns % 16 != 0 => {
            let because = "columns of a block, or of the piece that a shard cuts off, must be a multiple of 16";
            Err(refuse(backend, field, &format, because))
        }
        None | Some(Blocks { rows: _, cols: _, scale: _, act_order: _ }) => Ok(()),
    }
}

/// The GEMM kernels keep one sum for the columns that share both scales: a power of two of them.
fn nested_scales(backend: &'static str, field: &'static str, mlp: &ExpertMlp, parts: Parts) -> Result<(), Unsupported> {
    let group = match mlp.activation_quant {
        ActivationQuant::None => return Ok(()),
        ActivationQuant::Dynamic { code: _, span: ScaleSpan::Group(group), rule: _, scale: _ } => Some(group),
        ActivationQuant::Dynamic { code: _, span: ScaleSpan::Token | ScaleSpan::Tensor, rule: _, scale: _ }
        | ActivationQuant::Static { code: _ } => None,
    };
    let weights = parts.blocks.and_then(|blocks| blocks.cols);
    let whole = |block: usize| block.is_power_of_two() && (16..=2048).contains(&block);
    let nested = group.into_iter().chain(weights).all(whole) && group.is_none_or(|group| group >= 32);
    if !nested {
        let because = format!(
            "the columns that share a scale must be a power of two, 32 to 2048 of activations and 16 to 2048 of \
             weights, here of {:?}",
            mlp.format
        );
        return Err(refuse(backend, field, &mlp.activation_quant, because));
    }
    Ok(())
}

/// Codes and scales of the first and the second matrix of the columns that are here; `None` if they cannot be cut.
fn shard_parts(format: WeightFormat, shard: TensorShard) -> Option<[Parts; 2]> {
    let parts = format.parts();
    match shard {
        TensorShard::Whole => Some([parts, parts]),
        TensorShard::Part { first, size: _, owns_down_bias: _ } => {
            Some([parts.cut_rows(first), parts.cut_cols(first)?])
        }
    }
}

struct Lowering<'a> {
    spec: &'a MoeSpec,
    facts: &'a DeviceFacts,
    options: &'a Options,
    /// Whose tiles those of the routed experts are.
    units: Units,
    /// Whether all matrices of the routed experts are whole in their segments, where boxes of them may be copied.
    whole: bool,
    schedule: Schedule,
    params: usize,
    drafts: Vec<Draft>,
    /// Rows of tokens that are quantised already: how, from which buffer, to which rows.
    quantized: Vec<(ActivationQuant, usize, Rows)>,
    /// The buffer of counters, if anything is counted.
    counters: Option<usize>,
    /// Whether matrix units leave the routed experts' rows weighted.
    weighted_rows: bool,
}

/// Which rows of a GEMM are f32 that the spec rounds to bf16, and which matrix units therefore keep as bf16.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Narrow {
    /// None.
    Neither,
    /// Those that it writes.
    Out,
    /// Those that it reads.
    Rows,
}

/// A step before a bucket picks its kernel.
enum Draft {
    /// One dispatch for each segment.
    Gemm(Gemm),
    /// The same in every bucket.
    Step(Step),
    /// One for each cut that needs it.
    ByCut(Vec<(Cut, Step)>),
}

/// One GEMM before it is cut into segments and variants.
#[derive(Clone)]
struct Gemm {
    name: &'static str,
    part: Part,
    rows: RowSource,
    input: Rows,
    input_divisor: usize,
    weigh_input: Option<Rounding>,
    placed: Placed,
    /// How what adapters add joins the sums.
    delta: Option<LoraDelta>,
    /// An adapter's: matrix-vector products in every bucket, which leave zeros where there is none.
    adapter: bool,
    narrow: Narrow,
    /// Whether it writes bf16 rows that are weighted already, on matrix units.
    weighted: bool,
    epilogue: Epilogue,
    out: usize,
    /// Buffers of the bindings that only some GEMMs have.
    others: Vec<(&'static str, usize)>,
}

/// A buffer of rows and what it holds.
#[derive(Clone, Copy)]
struct Rows {
    buffer: usize,
    values: RowValues,
    /// Of codes.
    scales: Option<usize>,
}

impl Gemm {
    /// What it reads on matrix units.
    fn narrowed(&self) -> RowValues {
        match self.narrow {
            Narrow::Rows => RowValues::Floats(FloatType::Bf16),
            Narrow::Neither | Narrow::Out => self.input.values,
        }
    }
}

impl Rows {
    fn floats(buffer: usize, float_type: FloatType) -> Self {
        Self { buffer, values: RowValues::Floats(float_type), scales: None }
    }
}

/// The indices of a packed matrix in the schedule.
#[derive(Clone)]
struct Placed {
    matrix: usize,
    /// (segment buffer, span buffer) of each segment.
    buffers: Vec<(usize, usize)>,
}

/// What the routing leaves to the experts.
struct RoutedBuffers {
    /// The slot of each row.
    row_slots: usize,
    /// By binding.
    buffers: Vec<(&'static str, usize)>,
    shared_weights: Option<usize>,
}

impl<'a> Lowering<'a> {
    fn new(
        spec: &'a MoeSpec,
        scope: Scope,
        max_tokens: usize,
        chunk_tokens: usize,
        facts: &'a DeviceFacts,
        options: &'a Options,
        (units, whole): (Units, bool),
    ) -> Self {
        let schedule = Schedule {
            scope,
            max_tokens,
            chunk_tokens,
            buffers: vec![],
            expert_slots: match &spec.placement {
                Placement::All | Placement::Range { first: _, count: _ } => vec![],
                Placement::Map { num_slots: _, replicas: _, slots } => slots.clone(),
            },
            matrices: vec![],
            buckets: vec![],
            decisions: vec![],
        };
        let mut lowering = Self {
            spec,
            facts,
            options,
            units,
            whole,
            schedule,
            params: 0,
            drafts: vec![],
            quantized: vec![],
            counters: None,
            weighted_rows: false,
        };
        lowering.params = lowering.buffer("params", Contents::Params, 16);
        lowering
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
        parts: Parts,
        pair: usize,
        bias: bool,
    ) -> Result<Placed, Unsupported> {
        let matrix = PackedMatrix { name, groups, rows, cols, parts, pair, bias, segments: vec![] };
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
        let placed = self.place(name, 1, shape, format.parts(), 1, bias)?;
        self.drafts.push(Draft::Gemm(Gemm {
            name,
            part,
            rows: RowSource::Direct { groups: 1 },
            input,
            input_divisor: 1,
            weigh_input: None,
            placed,
            delta: None,
            adapter: false,
            narrow: Narrow::Neither,
            weighted: false,
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

    /// A step that counts, if anything is counted.
    fn diagnose(
        &mut self,
        part: Part,
        counted: Counted,
        [rows_per_token, cols]: [usize; 2],
        matrices: Matrices,
        slot: usize,
        buffers: &[(&'static str, usize)],
    ) -> Result<()> {
        let Some(counters) = self.counters else { return Ok(()) };
        let model = self.spec.precision.model;
        let operation = Diagnose { counted, rows_per_token, cols, matrices, slot, model };
        self.count(part, format!("diagnose[{slot}]"), operation, counters, buffers)
    }

    /// A step that counts.
    fn count(
        &mut self,
        part: Part,
        name: impl Into<String>,
        operation: Diagnose,
        counters: usize,
        buffers: &[(&'static str, usize)],
    ) -> Result<()> {
        let mut buffers = buffers.to_vec();
        buffers.push(("counters", counters));
        let grid = Grid { x: Extent::Fixed(1), y: Extent::Fixed(1) };
        let step = self.step(name, part, Operation::Diagnose(operation), grid, &buffers)?;
        self.drafts.push(Draft::Step(step));
        Ok(())
    }

    fn decide(&mut self, step: &'static str, choice: &'static str, because: impl Into<Cow<'static, str>>) {
        self.schedule.decisions.push(Decision { step, choice, because: because.into() });
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
        let storage = bindings.iter().filter(|binding| binding.access != Access::Uniform).count();
        debug_assert!(storage <= STORAGE_BUFFERS, "{name}");
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

    /// Whose tiles those of the routed experts are in calls of this cut. Numbers that few rows meet pass from memory
    /// through registers once, which warps do at least as fast; codes of 8 bits would have to be converted there.
    fn units_of(&self, cut: Cut) -> Units {
        match (self.units, cut) {
            (Units::Warpgroups { multiprocessors: _ }, Cut::Pairs) if !self.spec.experts.activation_quant.is_on() => {
                Units::Warps
            }
            (units, _) => units,
        }
    }

    /// Whether the routed experts have another kernel where codes fill their tiles.
    fn fills_tiles(&self) -> bool {
        let codes = self.spec.experts.activation_quant.is_on();
        codes && self.whole && matches!(self.units, Units::Warpgroups { multiprocessors: _ })
    }

    /// Most rows of a tile; `codes` where it has codes and meets matrices that are whole.
    pub(super) fn tile_rows(&self, cut: Cut, units: Units, codes: bool) -> usize {
        match (cut, units) {
            (Cut::FullTiles, Units::Warpgroups { multiprocessors: _ }) if codes => WGMMA_CODE_ROWS,
            (Cut::Gemv | Cut::Pairs | Cut::Quads | Cut::Octets | Cut::Tiles | Cut::FullTiles, _) => {
                cut.tile_rows(units)
            }
        }
    }

    /// Whether a GEMM of these rows can be on matrix units of some kind.
    fn fits_units(&self, gemm: &Gemm, input: RowValues) -> bool {
        self.facts.matrix_units != Units::None && self.kernel(gemm, input).matrix_units().is_some()
    }

    /// The routed experts' GEMMs, but for adapters'.
    fn routed(&self) -> impl Iterator<Item = &Gemm> {
        self.drafts.iter().filter_map(|draft| match draft {
            Draft::Gemm(gemm) => match gemm.rows {
                RowSource::Direct { groups: _ } => None,
                RowSource::Routed { top_k: _, num_slots: _ } => Some(gemm).filter(|gemm| !gemm.adapter),
            },
            Draft::Step(_) | Draft::ByCut(_) => None,
        })
    }

    /// Whether each segment holds whole matrices alone.
    fn is_whole(&self, gemm: &Gemm) -> bool {
        let matrix = &self.schedule.matrices[gemm.placed.matrix];
        (0..matrix.segments.len()).all(|segment| matrix.whole_matrix_vecs(segment).is_some())
    }

    /// The device's units, if all of the routed experts' GEMMs, but for adapters', fit those of warpgroups; or those of
    /// warps, if any fits them: the other kernels walk their tiles as well.
    fn fitting_units(&self) -> Units {
        let kernels: Vec<_> = self.routed().map(|gemm| (gemm, self.kernel(gemm, gemm.narrowed()))).collect();
        let any = kernels.iter().any(|(_, kernel)| kernel.matrix_units().is_some());
        match self.facts.matrix_units {
            Units::None => Units::None,
            Units::Warps | Units::Warpgroups { multiprocessors: _ } if !any => Units::None,
            Units::Warps => Units::Warps,
            units @ Units::Warpgroups { multiprocessors: _ } => {
                let all = kernels.iter().all(|(gemm, kernel)| self.fits_warpgroups(gemm, kernel));
                if all { units } else { Units::Warps }
            }
        }
    }

    /// Whether matrix units of warpgroups compute what the spec asks for: their sums of products of codes are narrower
    /// than f32. The 64 matrix rows of a warpgroup have one scale, and leave by whole vectors, where segments begin at
    /// multiples of them.
    fn fits_warpgroups(&self, gemm: &Gemm, kernel: &GroupedGemm) -> bool {
        let promoted = match self.spec.precision.block_scale {
            BlockScale::Promoted => true,
            BlockScale::Exact | BlockScale::Folded => false,
        };
        let precise = match kernel.input {
            RowValues::Floats(_) => true,
            RowValues::Codes { code: _, group: _, scales: _ } => promoted,
        };
        let mut spans = self.schedule.matrices[gemm.placed.matrix].segments.iter().flat_map(|part| &part.spans);
        precise && kernel.fits_warpgroups() && spans.all(|span| span.row_begin.is_multiple_of(64))
    }

    /// Buffers, matrices and steps, but for what a bucket chooses.
    fn draft(&mut self) -> Result<()> {
        let hidden_size = self.spec.hidden_size;
        let input = self.spec.precision.input;
        let hidden_states = self.token_buffer("hidden_states", Contents::HiddenStates, hidden_size * input.bytes());
        let hidden_states = Rows::floats(hidden_states, input);
        let loads = match self.spec.entry {
            Entry::TokenMajor => self.spec.num_experts,
            Entry::Batched { capacity: _ } => self.spec.num_slots(),
        };
        let words = LOAD_SLOT + loads;
        self.counters = self.options.diagnostics.then(|| self.buffer(DIAGNOSTICS, Contents::Scratch, 4 * words));
        match (self.schedule.scope, self.spec.entry) {
            (Scope::Routing, Entry::TokenMajor | Entry::Batched { capacity: _ }) => {
                self.spec.expect_routing()?;
                self.routing(hidden_states)?;
            }
            (Scope::Layer, Entry::TokenMajor) => {
                let routed = self.routing(hidden_states)?;
                let routed = self.assign(routed)?;
                self.layer(hidden_states, &routed)?;
            }
            (Scope::Layer, Entry::Batched { capacity }) => {
                let routed = self.batched(capacity)?;
                self.layer(hidden_states, &routed)?;
            }
        }
        Ok(())
    }

    fn buckets(&mut self) -> Result<()> {
        let chunk = self.schedule.chunk_tokens;
        let mut covered = 0;
        for cut in Cut::ALL {
            let tokens = self.most_tokens(cut).min(chunk);
            if tokens <= covered {
                continue;
            }
            covered = tokens;
            let choice = match (cut, self.units_of(cut)) {
                (Cut::Gemv, _) => "a row at a time",
                (Cut::Pairs, Units::None) => "two rows at a time",
                (Cut::Quads, Units::None) => "four rows at a time",
                (Cut::Octets, Units::None) => "eight rows at a time",
                (Cut::Tiles | Cut::FullTiles, Units::None) => "tiles of 64 rows",
                (Cut::Pairs, Units::Warps) => "eight rows at a time on matrix units",
                (Cut::Quads, Units::Warps) => "sixteen rows at a time on matrix units",
                (Cut::Octets, Units::Warps) => "32 rows at a time on matrix units",
                (Cut::Tiles | Cut::FullTiles, Units::Warps) => "64 rows at a time on matrix units",
                (Cut::Pairs, Units::Warpgroups { multiprocessors: _ }) => {
                    "sixteen rows at a time on matrix units of warpgroups"
                }
                (Cut::Quads, Units::Warpgroups { multiprocessors: _ }) => {
                    "32 rows at a time on matrix units of warpgroups"
                }
                (Cut::Octets, Units::Warpgroups { multiprocessors: _ }) => {
                    "64 rows at a time on matrix units of warpgroups"
                }
                (Cut::FullTiles, Units::Warpgroups { multiprocessors: _ }) if self.fills_tiles() => {
                    "128 rows at a time on matrix units of warpgroups"
                }
                (Cut::Tiles | Cut::FullTiles, Units::Warpgroups { multiprocessors: _ }) => {
                    "up to 160 rows at a time on matrix units of warpgroups"
                }
            };
            let up_to = || format!("up to {} rows of a matrix in the mean", cut.most_mean_rows(self.units));
            let because: Cow<'static, str> = match (self.options.cuts, cut) {
                (Cuts::UpTo(_) | Cuts::UpToMeanRows(_), _) => "options.cuts says so".into(),
                (Cuts::ByMeanRows, Cut::Gemv) => "in small calls few matrices have more than one row".into(),
                (Cuts::ByMeanRows, Cut::Pairs | Cut::Quads | Cut::Octets) => up_to().into(),
                (Cuts::ByMeanRows, Cut::Tiles) if self.fills_tiles() => up_to().into(),
                (Cuts::ByMeanRows, Cut::Tiles | Cut::FullTiles) => {
                    "in large calls the rows of a matrix fill them".into()
                }
            };
            self.decide("grouped_gemm", choice, because);
            let mut steps = vec![];
            for draft in &self.drafts {
                match (draft, cut) {
                    (Draft::Gemm(gemm), cut) => {
                        self.gemm(&mut steps, gemm, if gemm.adapter { Cut::Gemv } else { cut })?
                    }
                    (Draft::Step(step), _) => steps.push(step.clone()),
                    (Draft::ByCut(by_cut), cut) => {
                        steps.extend(by_cut.iter().filter(|(of, _)| *of == cut).map(|(_, step)| step.clone()));
                    }
                }
            }
            self.check_limits(&steps, tokens)?;
            self.schedule.buckets.push(Bucket { max_tokens: tokens, steps });
        }
        Ok(())
    }

    /// Up to how many tokens of a chunk GEMMs are cut so.
    fn most_tokens(&self, cut: Cut) -> usize {
        let rows_per_token = self.spec.rows_per_token().max(self.spec.shared_mlps());
        let workgroups = self.facts.max_workgroups as usize;
        let launchable = match cut {
            // A workgroup a row.
            Cut::Gemv => workgroups / rows_per_token,
            // Or a tile, which need not be full.
            Cut::Pairs | Cut::Quads | Cut::Octets => {
                workgroups.saturating_sub(self.spec.num_slots()) * cut.tile_rows(self.units_of(cut)) / rows_per_token
            }
            // Chunks are cut for these.
            Cut::Tiles | Cut::FullTiles => usize::MAX,
        };
        let of_mean = |rows: f64| (rows * self.spec.num_slots() as f64 / self.spec.rows_per_token() as f64) as usize;
        let wanted = match self.options.cuts {
            Cuts::ByMeanRows if self.units != Units::None && cut == Cut::Gemv => UNITS_GEMV_TOKENS,
            Cuts::ByMeanRows if cut == Cut::Tiles && !self.fills_tiles() => usize::MAX,
            Cuts::ByMeanRows => of_mean(cut.most_mean_rows(self.units)),
            Cuts::UpTo(tokens) => of_cut(cut, tokens).unwrap_or(usize::MAX),
            Cuts::UpToMeanRows(sixteenths) => match of_cut(cut, sixteenths) {
                None | Some(u32::MAX) => usize::MAX,
                Some(most) => of_mean(f64::from(most) / 16.0),
            },
        };
        wanted.min(launchable)
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

    fn rows_per_token(&self, rows: RowSource) -> usize {
        match rows {
            RowSource::Direct { groups } => groups,
            RowSource::Routed { top_k, num_slots: _ } => top_k,
        }
    }

    /// The kernel of a draft, not yet cut.
    fn kernel(&self, gemm: &Gemm, input: RowValues) -> GroupedGemm {
        let matrix = &self.schedule.matrices[gemm.placed.matrix];
        GroupedGemm {
            rows: gemm.rows,
            variant: GemmVariant::Tiled,
            input,
            input_divisor: gemm.input_divisor,
            weigh_input: gemm.weigh_input,
            matrix_rows: matrix.rows,
            cols: matrix.cols,
            parts: matrix.parts,
            pair: matrix.pair,
            bias: matrix.bias,
            delta: gemm.delta,
            fill_absent: gemm.adapter,
            epilogue: gemm.epilogue,
            stored: FloatType::F32,
            model: self.spec.precision.model,
            exact_halves: self.facts.exact_halves,
        }
    }

    /// One step for each segment.
    fn gemm(&self, steps: &mut Vec<Step>, gemm: &Gemm, cut: Cut) -> Result<()> {
        let Gemm { name, part, rows, input, input_divisor, ref placed, adapter, out, ref others, .. } = *gemm;
        let matrix = &self.schedule.matrices[placed.matrix];
        let limit = self.facts.max_workgroups as usize;
        let values = match (input.values, cut) {
            (
                RowValues::Codes { code, group: Some(group), scales: ScaleLayout::RowMajor },
                Cut::Tiles | Cut::FullTiles,
            ) => {
                let rows_per_token = self.rows_per_token(rows) / input_divisor;
                let scales = column_major(self.schedule.chunk_tokens * rows_per_token);
                RowValues::Codes { code, group: Some(group), scales }
            }
            (values, _) => values,
        };
        let mut kernel = self.kernel(gemm, values);
        let units = match rows {
            // Logits decide, and keep all the bits of f32 rows.
            RowSource::Direct { groups: _ } => part == Part::Experts && self.facts.matrix_units != Units::None,
            RowSource::Routed { top_k: _, num_slots: _ } => self.units != Units::None && !adapter,
        };
        let units = units && cut != Cut::Gemv && kernel.matrix_units().is_some();
        match gemm.narrow {
            Narrow::Out if units => kernel.stored = FloatType::Bf16,
            Narrow::Rows if units => kernel.input = gemm.narrowed(),
            Narrow::Neither | Narrow::Out | Narrow::Rows => {}
        }
        if gemm.weighted && units {
            (kernel.epilogue, kernel.stored) = (Epilogue::Weighted, FloatType::Bf16);
        }
        // The routed experts' GEMMs share their tiles; those of the others are as high as their kernel has them.
        let tiles = match (rows, self.facts.matrix_units) {
            (RowSource::Routed { top_k: _, num_slots: _ }, _) => self.units_of(cut),
            (RowSource::Direct { groups: _ }, _) if !units => Units::None,
            (RowSource::Direct { groups: _ }, Units::Warpgroups { multiprocessors: _ })
                if !self.fits_warpgroups(gemm, &kernel) =>
            {
                Units::Warps
            }
            (RowSource::Direct { groups: _ }, units) => units,
        };
        let codes = match (rows, kernel.input) {
            (RowSource::Routed { top_k: _, num_slots: _ }, _) => self.fills_tiles(),
            (RowSource::Direct { groups: _ }, RowValues::Codes { code: _, group: _, scales: _ }) => self.is_whole(gemm),
            (RowSource::Direct { groups: _ }, RowValues::Floats(_)) => false,
        };
        for (segment, &(packed, spans)) in placed.buffers.iter().enumerate() {
            let span_rows = matrix.max_span_rows(segment);
            let by_row = |lanes: u32| GEMV_WORKGROUP / lanes * GEMV_ROWS_PER_LANE;
            let rows_of_tile = self.tile_rows(cut, tiles, codes);
            let (variant, tile_cols) = match (cut, rows_of_tile) {
                (_, rows) if units => match tiles {
                    Units::Warpgroups { multiprocessors: _ } => {
                        let height = kernel.wgmma_matrix_rows(rows);
                        let matrix_blocks = span_rows.div_ceil(height);
                        let whole = matrix.whole_matrix_vecs(segment);
                        let matrix_vecs = whole.filter(|_| rows == WGMMA_CODE_ROWS);
                        (GemmVariant::Wgmma { rows, matrix_blocks, matrix_vecs }, height)
                    }
                    Units::None | Units::Warps => (GemmVariant::Mma { rows }, mma_matrix_rows(rows)),
                },
                (Cut::Gemv, _) => {
                    let most = if matrix.rows < FEW_MATRIX_ROWS { GEMV_WORKGROUP } else { GEMV_LANES };
                    let lanes = lanes(kernel.vecs_per_row(), most);
                    let tile_rows = by_row(lanes);
                    (GemmVariant::Gemv { workgroup_size: GEMV_WORKGROUP, lanes, tile_rows }, tile_rows as usize)
                }
                (Cut::Pairs | Cut::Quads | Cut::Octets, rows @ 0..=8) => {
                    let most = if matrix.rows < FEW_MATRIX_ROWS { 4 * ROWS_LANES } else { ROWS_LANES };
                    let lanes = lanes(kernel.staged_vecs(rows), most);
                    let tile_rows = by_row(lanes);
                    (GemmVariant::Rows { workgroup_size: GEMV_WORKGROUP, lanes, tile_rows, rows }, tile_rows as usize)
                }
                (Cut::Pairs | Cut::Quads | Cut::Octets | Cut::Tiles | Cut::FullTiles, _) => {
                    (GemmVariant::Tiled, TILE_COLS)
                }
            };
            let y = match (variant.tile_rows(), rows) {
                (None, rows) => Extent::PerToken { items: self.rows_per_token(rows), per: 1, limit },
                (Some(rows), RowSource::Direct { groups }) => Extent::GroupTiles { groups, rows },
                (Some(_), RowSource::Routed { top_k: _, num_slots: _ }) => Extent::Tiles(self.permute(cut)),
            };
            let grid = match (variant, tiles) {
                // Blocks that stay.
                (
                    GemmVariant::Wgmma { rows, matrix_blocks: _, matrix_vecs: _ },
                    Units::Warpgroups { multiprocessors },
                ) => Grid { x: Extent::Fixed(multiprocessors * wgmma_blocks(rows)), y: Extent::Fixed(1) },
                _ => Grid { x: Extent::Fixed(span_rows.div_ceil(tile_cols)), y },
            };
            let operation = Operation::GroupedGemm(GroupedGemm { variant, ..kernel.clone() });
            let mut buffers = vec![("rows", input.buffer), ("segment", packed), ("spans", spans), ("out", out)];
            buffers.extend(others);
            buffers.extend(input.scales.map(|scales| ("input_scales", scales)));
            let name = if placed.buffers.len() == 1 { name.to_string() } else { format!("{name}[{segment}]") };
            steps.push(self.step(name, part, operation, grid, &buffers)?);
        }
        Ok(())
    }
}

/// What an option says of a cut; nothing of the last.
fn of_cut<T>(cut: Cut, said: [T; 5]) -> Option<T> {
    Cut::ALL.into_iter().zip(said).find(|(of, _)| *of == cut).map(|(_, said)| said)
}

/// Invocations that share a matrix row, at most `most`: so that few of them wait for the rest where `vecs` end.
fn lanes(vecs: usize, most: u32) -> u32 {
    let waste = |lanes: u32| vecs.next_multiple_of(lanes as usize) * 8 > vecs * 9;
    let mut lanes = most;
    while lanes > 1 && waste(lanes) {
        lanes /= 2;
    }
    lanes
}

/// Columns of scales for so many rows.
fn column_major(rows: usize) -> ScaleLayout {
    ScaleLayout::ColumnMajor { stride: rows.next_multiple_of(4) }
}

/// Tokens whose activations fit the device's bindings.
fn chunk_tokens(
    spec: &MoeSpec,
    scope: Scope,
    max_tokens: usize,
    facts: &DeviceFacts,
    options: &Options,
) -> Result<usize> {
    let limit = usize::try_from(facts.max_binding_bytes.min(1 << 31)).unwrap_or(usize::MAX);
    let mut per_token = vec![("hidden_size", 4 * spec.hidden_size), ("num_experts", 4 * spec.router_outputs())];
    match spec.router {
        Router::Mlp { state_size, rms_norm_eps: _, previous_state: _, format: _ } => {
            per_token.push(("router.state_size", 4 * state_size));
        }
        Router::Linear { input: _, format: _, bias: _, transform: _ } | Router::Given { transform: _ } => {}
    }
    let mut rows_per_token = spec.rows_per_token();
    if scope == Scope::Layer {
        let rows = rows_per_token;
        per_token.push(("top_k * hidden_size", 4 * rows * spec.expert_width()));
        // Gate and up are stored where something else reads them: a quantisation, a diagnosis.
        let sums = |mlp: &ExpertMlp| {
            (mlp.activation_quant.is_on() || options.diagnostics || spec.lora.is_some()) && mlp.activation.gated()
        };
        let pair = |mlp: &ExpertMlp| if sums(mlp) { 2 } else { 1 };
        let (_, columns) = spec.shard.columns(spec.experts.intermediate_size);
        per_token.push(("top_k * intermediate_size", 4 * rows * pair(&spec.experts) * columns));
        if let Some(Lora { num_adapters: _, rank, format: _, delta: _ }) = spec.lora {
            per_token.push(("top_k * lora.rank", 4 * rows * rank));
        }
        if let Some(SharedExperts { mlp, gate: _, combination: _ }) = &spec.shared {
            let mlps = spec.shared_mlps();
            rows_per_token = rows_per_token.max(mlps);
            per_token.push(("shared.hidden_size", 4 * mlps * spec.hidden_size));
            per_token.push(("shared.intermediate_size", 4 * mlps * pair(mlp) * mlp.intermediate_size));
        }
    }
    // The routing has a workgroup a token, the tiled GEMM one a tile.
    let workgroups = facts.max_workgroups as usize;
    let tiled = workgroups.saturating_sub(spec.num_slots()) * TILE_ROWS / rows_per_token;
    let mut chunk = max_tokens.min(workgroups).min(tiled);
    if scope == Scope::Layer && spec.lora.is_some() {
        // Adapters' products have a workgroup a row.
        chunk = chunk.min(workgroups / rows_per_token);
    }
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
