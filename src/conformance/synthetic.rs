//! Layers whose weights are a hash of their place: made on the device by [`Synthesize`] and never uploaded, so that a
//! layer may be of any size; of single experts the reference makes its own.

use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::matrix::{OwnedMatrix, OwnedTensor};
use super::sample::deepseek_like;
use crate::error::{Error, Result, Unsupported};
use crate::host::{Host, Session};
use crate::kernels::pack::PackedMatrix;
use crate::kernels::synthesize::{Elements, elements, hash};
use crate::kernels::{Operation, Stage, Stream, Synthesize};
use crate::numerics;
use crate::plan::{self, BufferSlice, Launch, Plan};
use crate::reference::{self, Inputs, Layer};
use crate::schedule::{self, Contents, Cut, Cuts, Options};
use crate::spec::{
    LogitTransform, MoeSpec, Placement, Router, RoutingMethod, ScaleFormat, Score, SelectionKey, WeightFormat,
};
use crate::support::Scope;
use crate::weights::{Dtype, MlpWeights, MoeWeights, RouterWeights};

/// Numbers of an expert's matrices; each has three tensors.
const GATE: u32 = 0;
const UP: u32 = 3;
const DOWN: u32 = 6;
/// Tensors that are no weights of experts.
const SELECTION_BIAS: u32 = 16;
const HIDDEN_STATES: u32 = 17;
const LOGITS: u32 = 18;

fn unsupported(field: &'static str, value: impl std::fmt::Debug, because: &'static str) -> Error {
    let (backend, value) = ("synthesize".into(), format!("{value:?}"));
    Unsupported { backend, field: field.into(), value, because: because.into() }.into()
}

/// The kernel that makes the segments of a packed matrix.
///
/// # Errors
/// A matrix that is not the experts', or of a format that is not made.
pub fn kernel(matrix: &PackedMatrix) -> Result<Synthesize> {
    let first = match (matrix.name, matrix.pair) {
        ("experts.gate_up", 2) => GATE,
        ("experts.gate_up", 1) => UP,
        ("experts.down", 1) => DOWN,
        (name, _) => return Err(unsupported("matrix", name, "only weights of routed experts are made")),
    };
    Ok(Synthesize::of(matrix, first)?)
}

/// Makes a segment of a packed matrix where it lies.
///
/// # Errors
/// As [`kernel`], or a failing device.
pub fn fill<B: Host>(host: &B, matrix: &PackedMatrix, spans: &B::Buffer, segment: &B::Buffer) -> Result<()> {
    let operation = Operation::Synthesize(kernel(matrix)?);
    let kernel = host.compile(matrix.name, &operation)?;
    let slice = |buffer| BufferSlice { buffer, offset: 0, bytes: host.buffer_bytes(buffer) };
    let binding = host.bind(&kernel, &[slice(spans), slice(segment)])?;
    // Several vectors an invocation, whatever the size.
    const WORKGROUPS: u32 = 256;
    let launch =
        Launch { kernel: &kernel, binding: &binding, workgroups: [WORKGROUPS, matrix.groups as u32, 1], params: 0 };
    let mut encoder = host.encoder();
    host.launch(&mut encoder, &mut std::iter::once(launch))?;
    host.submit(encoder)
}

/// Plans a layer of synthetic weights.
///
/// # Errors
/// As [`Plan::new`], and a layer with weights beside those of the routed experts and the selection's bias.
pub fn plan<B: Host>(host: B, spec: &MoeSpec, max_tokens: usize, options: &Options) -> Result<Plan<B>> {
    let schedule = schedule::lower(spec, Scope::Layer, max_tokens, &host.facts(), options)?;
    schedule.matrices.iter().try_for_each(|matrix| kernel(matrix).map(|_| ()))?;
    let router = router(spec);
    let tables = plan::fill(&router, None);
    let plan = Plan::from_schedule(host, schedule, &|schedule, buffer, write| match buffer.contents {
        Contents::Segment { matrix: _, segment: _ } => Ok(()),
        _ => tables(schedule, buffer, write),
    })?;
    let held: Vec<_> = plan.owned().collect();
    for (contents, buffer) in &held {
        let Contents::Segment { matrix, segment } = *contents else { continue };
        let spans = held.iter().find(|(other, _)| *other == Contents::Spans { matrix, segment });
        if let Some((_, spans)) = spans {
            fill(plan.backend(), &plan.schedule().matrices[matrix], spans, buffer)?;
        }
    }
    Ok(plan)
}

/// The seconds of `runs` runs, behind as many as it takes for a device's clock to rise.
fn warm<B: Host>(
    host: &B,
    runs: usize,
    record: &mut dyn FnMut(&mut B::Encoder, usize) -> Result<()>,
) -> Result<(Vec<f64>, &'static str)> {
    const WARM_UP: Duration = Duration::from_millis(300);
    let begun = Instant::now();
    loop {
        let timed = host.time(runs, record)?;
        if begun.elapsed() >= WARM_UP {
            return Ok(timed);
        }
    }
}

/// Bytes a second that a device reads at best: a kernel that does nothing else, over `bytes` bytes.
///
/// # Errors
/// The device refuses.
pub fn read_rate<B: Host>(host: &B, bytes: u64) -> Result<f64> {
    const COLS: usize = 4096;
    const WORKGROUPS: usize = 2048;
    const RUNS: usize = 5;
    let matrix = PackedMatrix {
        name: "experts.down",
        groups: 1,
        rows: (bytes as usize / (4 * COLS)).max(1),
        cols: COLS,
        parts: WeightFormat::F32.parts(),
        pair: 1,
        bias: false,
        segments: vec![],
    };
    let facts = host.facts();
    let matrix = matrix.place(facts.backend, facts.max_binding_bytes)?;
    let sums = host.create_buffer("sums", 4 * (WORKGROUPS * Stream::WORKGROUP) as u64, false)?;
    let kernel = host.compile("stream", &Operation::Stream(Stream))?;
    let mut bindings = vec![];
    for (index, segment) in matrix.segments.iter().enumerate() {
        let spans = host.upload("spans", &matrix.span_table(index))?;
        let source = host.create_buffer("stream", 4 * segment.words as u64, false)?;
        fill(host, &matrix, &spans, &source)?;
        let slice = |buffer| BufferSlice { buffer, offset: 0, bytes: host.buffer_bytes(buffer) };
        bindings.push(host.bind(&kernel, &[slice(&source), slice(&sums)])?);
    }
    let record = &mut |encoder: &mut B::Encoder, _| {
        let workgroups = [WORKGROUPS as u32, 1, 1];
        let launch = |binding| Launch { kernel: &kernel, binding, workgroups, params: 0 };
        host.launch(encoder, &mut bindings.iter().map(launch))
    };
    let (seconds, _) = warm(host, RUNS, record)?;
    let best = seconds.into_iter().fold(f64::INFINITY, f64::min);
    Ok(matrix.bytes() as f64 / best)
}

/// Seconds that a dispatch takes which does next to nothing and waits for the one before, many of them in one pass; and
/// how that was measured.
///
/// # Errors
/// The device refuses.
pub fn dispatch_cost<B: Host>(host: &B) -> Result<(f64, &'static str)> {
    const MANY: usize = 1000;
    const RUNS: usize = 10;
    let kernel = host.compile("stream", &Operation::Stream(Stream))?;
    let source = host.upload("stream", &[1, 2, 3, 4])?;
    // Each writes the same words, so that none can begin before the one before has ended.
    let sums = host.create_buffer("sums", 4 * Stream::WORKGROUP as u64, false)?;
    let slice = |buffer| BufferSlice { buffer, offset: 0, bytes: host.buffer_bytes(buffer) };
    let binding = host.bind(&kernel, &[slice(&source), slice(&sums)])?;
    // One and one with many more in turn: the difference is that of the dispatches alone.
    let record = &mut |encoder: &mut B::Encoder, at: usize| {
        let launch = |_| Launch { kernel: &kernel, binding: &binding, workgroups: [1, 1, 1], params: 0 };
        host.launch(encoder, &mut (0..1 + at % 2 * MANY).map(launch))
    };
    let (seconds, method) = warm(host, RUNS, record)?;
    let best = |parity: usize| seconds.iter().skip(parity).step_by(2).copied().fold(f64::INFINITY, f64::min);
    Ok(((best(1) - best(0)).max(0.0) / MANY as f64, method))
}

/// Operations a second that GEMMs get out of a device, counted as [`Schedule::work`](crate::Schedule::work) does: the
/// least of all ways to cut them. With [`read_rate`] it makes the [`Rates`](crate::Rates) of a [`Pace`](crate::Pace).
///
/// # Errors
/// The device refuses.
pub fn flop_rate<B: Host + Clone>(host: &B) -> Result<f64> {
    // Seconds of a step below which its start counts, so that more is asked.
    const SHORT: f64 = 1e-3;
    let (first, seconds) = slowest_gemm(host, [256, 256])?;
    match seconds < SHORT {
        true => Ok(slowest_gemm(host, [2048, 768])?.0.max(first)),
        false => Ok(first),
    }
}

/// The least operations a second of a GEMM of experts of [hidden size, intermediate size], and the seconds it took.
fn slowest_gemm<B: Host + Clone>(host: &B, [hidden_size, intermediate_size]: [usize; 2]) -> Result<(f64, f64)> {
    const TOKENS: usize = 64;
    const RUNS: usize = 3;
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (hidden_size, 16, 2);
    (spec.experts.intermediate_size, spec.shared) = (intermediate_size, None);
    spec.router = Router::Given { transform: LogitTransform::None };
    spec.routing.method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    let all = |row: &dyn Fn(usize) -> Vec<f32>| (0..TOKENS).flat_map(row).collect::<Vec<f32>>();
    let (rows, logits) = (all(&|token| hidden_states(&spec, 0, token)), all(&|token| logits(&spec, 0, token)));
    let mut slowest = (f64::INFINITY, 0.0);
    for cut in Cut::ALL {
        let options = Options { cuts: Cuts::only(cut), ..Options::AUTO };
        let session = Session::new(plan(host.clone(), &spec, TOKENS, &options)?, &spec)?;
        session.write(&Inputs { logits: Some(&logits), ..Inputs::of(&rows) })?;
        // A clock rises in the first runs.
        session.time_steps(TOKENS, RUNS)?;
        let (seconds, _) = session.time_steps(TOKENS, RUNS)?;
        for (step, seconds) in session.bound().steps(TOKENS).iter().zip(seconds) {
            if step.operation.stage() == Stage::GroupedGemm {
                let rate = session.plan().schedule().work(step, TOKENS).flops as f64 / seconds.max(1e-9);
                slowest = if rate < slowest.0 { (rate, seconds) } else { slowest };
            }
        }
    }
    Ok(slowest)
}

/// The router's weights: a bias of the selection, where there is one.
fn router(spec: &MoeSpec) -> RouterWeights<'static> {
    // 0 to 0.001: it changes the order of some scores. The best sigmoids of logits up to 4 are so close together that a
    // larger one would choose the same experts for all tokens, and layers that are timed are to read all of them.
    let bias = |expert: usize| (hash(SELECTION_BIAS, 0, 0, expert as u32) >> 16) as f32 / 65_536_000.0;
    let selection_bias = spec.has_selection_bias().then(|| (0..spec.selectable()).map(bias).collect());
    RouterWeights { selection_bias, ..RouterWeights::NONE }
}

/// Row `token` of input `input`: about N(0, 1), in the spec's type, which holds it exactly.
pub fn hidden_states(spec: &MoeSpec, input: usize, token: usize) -> Vec<f32> {
    let value = |col: usize| {
        // The sum of four bytes, of which each has variance (256^2 - 1) / 12.
        let bytes = hash(HIDDEN_STATES, input as u32, token as u32, col as u32).to_le_bytes();
        let sum: i32 = bytes.into_iter().map(i32::from).sum();
        numerics::round_to(spec.precision.input, (sum - 510) as f32 / 147.8)
    };
    (0..spec.hidden_size).map(value).collect()
}

/// Its logits: multiples of 2^-10 below 4, so that two are equal or far apart.
pub fn logits(spec: &MoeSpec, input: usize, token: usize) -> Vec<f32> {
    let value = |output: usize| {
        let bits = hash(LOGITS, input as u32, token as u32, output as u32) >> 19;
        (bits as f32 - 4096.0) / 1024.0
    };
    (0..spec.router_outputs()).map(value).collect()
}

/// What a layer of synthetic weights makes of one row, computed with the experts that it chooses and no others.
///
/// # Errors
/// As [`reference::layer`], and a format that is not made.
pub fn reference_row(spec: &MoeSpec, input: usize, token: usize) -> Result<Layer> {
    let (hidden_states, logits) = (hidden_states(spec, input, token), logits(spec, input, token));
    let inputs = Inputs { logits: Some(&logits), ..Inputs::of(&hidden_states) };
    let router = router(spec);
    let routed = reference::route(spec, &router, inputs)?;
    let mut ids: Vec<usize> = routed.topk_ids.iter().filter_map(|&id| usize::try_from(id).ok()).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut slots = vec![-1; spec.num_experts];
    for (slot, &id) in ids.iter().enumerate() {
        slots[id] = slot as i32;
    }
    let mut part = spec.clone();
    part.placement = Placement::Map { num_slots: ids.len(), replicas: 1, slots };
    let experts = ids.iter().map(|&id| Expert::new(spec, id)).collect::<Result<Vec<_>>>()?;
    let weights = MoeWeights {
        router,
        experts: experts.iter().map(Expert::view).collect::<Result<_>>()?,
        lora: vec![],
        shared: vec![],
        shared_gate: None,
        latent: None,
        output_bias: None,
        output_norm: None,
    };
    reference::layer(&part, &weights, inputs)
}

/// One expert in its checkpoint form.
pub struct Expert {
    gate: Option<OwnedMatrix>,
    up: OwnedMatrix,
    down: OwnedMatrix,
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    down_bias: Option<Vec<f32>>,
}

impl Expert {
    /// Expert `id`.
    ///
    /// # Errors
    /// A format that is not made.
    pub fn new(spec: &MoeSpec, id: usize) -> Result<Self> {
        let (mlp, width) = (&spec.experts, spec.expert_width());
        let inner = mlp.intermediate_size;
        let gated = mlp.activation.gated();
        let bias = |wanted: bool, matrix: u32, rows: usize| {
            let one = |row| f32::from_bits(Elements::BIASES.word(matrix + 2, id, row, 0, 1));
            wanted.then(|| (0..rows).map(one).collect())
        };
        Ok(Self {
            gate: if gated { Some(matrix(mlp.format, GATE, id, [inner, width])?) } else { None },
            up: matrix(mlp.format, UP, id, [inner, width])?,
            down: matrix(mlp.format, DOWN, id, [width, inner])?,
            gate_bias: bias(mlp.gate_up_bias && gated, GATE, inner),
            up_bias: bias(mlp.gate_up_bias, UP, inner),
            down_bias: bias(mlp.down_bias, DOWN, width),
        })
    }

    /// As a checkpoint's.
    ///
    /// # Errors
    /// Tensors that are not what format and shape imply.
    pub fn view(&self) -> Result<MlpWeights<'_>> {
        let Self { gate, up, down, gate_bias, up_bias, down_bias } = self;
        Ok(MlpWeights {
            gate: gate.as_ref().map(OwnedMatrix::view).transpose()?,
            up: up.view()?,
            down: down.view()?,
            gate_bias: gate_bias.clone(),
            up_bias: up_bias.clone(),
            down_bias: down_bias.clone(),
            input_scales: None,
        })
    }
}

/// Codes and scales of matrix `first` of expert `group`.
fn matrix(format: WeightFormat, first: u32, group: usize, [rows, cols]: [usize; 2]) -> Result<OwnedMatrix> {
    let (codes, scales) = elements(&format.parts(), cols)?;
    let refused = || unsupported("experts.format", format, "no such weights are made");
    let (dtype, width, block) = match format {
        WeightFormat::F32 => (Dtype::F32, cols, None),
        WeightFormat::F16 => (Dtype::F16, cols, None),
        WeightFormat::Bf16 => (Dtype::BF16, cols, None),
        WeightFormat::Fp8Block { block, scale } => {
            let dtype = match scale {
                ScaleFormat::F32 => Dtype::F32,
                ScaleFormat::F16 => Dtype::F16,
                ScaleFormat::Bf16 => Dtype::BF16,
                ScaleFormat::E8m0 => Dtype::F8_E8M0,
            };
            (Dtype::F8_E4M3, cols, Some((block, dtype)))
        }
        WeightFormat::Mxfp4 => (Dtype::U8, cols / 2, Some(([1, 32], Dtype::F8_E8M0))),
        WeightFormat::Fp8Tensor
        | WeightFormat::Fp8Channel
        | WeightFormat::Int8Channel
        | WeightFormat::Nvfp4
        | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
        | WeightFormat::Q8_0
        | WeightFormat::Q4K
        | WeightFormat::Q6K => return Err(refused()),
    };
    let tensor = |elements: Elements, number: u32, dtype: Dtype, shape: [usize; 2], count: usize| {
        let row_bytes = count * elements.bits / 8;
        let mut bytes = vec![0; shape[0] * row_bytes];
        bytes.par_chunks_exact_mut(row_bytes).enumerate().for_each(|(row, bytes)| {
            for (word, bytes) in bytes.chunks_mut(4).enumerate() {
                bytes.copy_from_slice(&elements.word(number, group, row, word, count).to_le_bytes()[..bytes.len()]);
            }
        });
        OwnedTensor { dtype, shape: shape.to_vec(), bytes }
    };
    let stored = tensor(codes, first, dtype, [rows, width], cols);
    let beside = scales.zip(block).map(|(elements, (block, dtype))| {
        let shape = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
        tensor(elements, first + 1, dtype, shape, shape[1])
    });
    Ok(OwnedMatrix::of(stored, beside, format, [rows, cols]))
}
