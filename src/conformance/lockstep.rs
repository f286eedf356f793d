//! Every step of a call on a device against its twin, both from the device's own buffers: so the first kernel that is
//! wrong is named, and no error of one hides in the next.

use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use crate::host::{Host, Session, decode};
use crate::kernels::{Access, GemmVariant, GroupedGemm, Operation, RowValues, ValueSource};
use crate::plan::{Backend as _, Tokens};
use crate::reference::Inputs;
use crate::schedule::{Buffer, Contents};
use crate::spec::{FloatType, MoeSpec};

use super::trial::rounds;

/// Rounding errors of an f32 sum of n terms of size 1 walk at random: sqrt(n) times half an ulp of the sum, some
/// sixteen times that at worst over a whole buffer. Relative to the row's largest value, or 1.
const SUM_TOLERANCE: f64 = 16.0 * 6e-8;
/// Of a sum whose blocks are kept by FP8 units ([`BlockScale::Promoted`](crate::spec::BlockScale)).
const PROMOTED_TOLERANCE: f64 = 1.0 / 512.0;
/// One `exp` and a division in WGSL: 3 + 2|x| and 2.5 ulp, |x| below 10. Likewise relative.
const SCORE_TOLERANCE: f64 = 3e-6;
/// Scales behind an activation, relative.
const SCALE_TOLERANCE: f64 = 4e-6;
/// An ulp or some move one value of so many across the middle of two codes, or of two values of the model's type.
const FLIPPED: usize = 50;

/// What a step's kernel came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// The step.
    pub step: String,
    /// Its kernel, stage and variant.
    pub kernel: &'static str,
    /// Of what it wrote, the part that is nearest to its tolerance: relative to the row's largest value, or the
    /// number of wrong words where they have to be exact.
    pub error: f64,
    /// What the device may be off by.
    pub tolerance: f64,
    /// The first element that is wrong.
    pub complaint: Option<String>,
}

/// Runs a layer on these inputs step by step. Both sessions have the same schedule, and the weights of one layer.
///
/// # Errors
/// A failing device, inputs that do not fit, sessions of two schedules.
pub fn walk<B: Host>(
    device: &Session<B>,
    twin: &Session<Cpu>,
    spec: &MoeSpec,
    inputs: &Inputs<'_>,
) -> Result<Vec<Compared>> {
    if twin.plan().schedule() != device.plan().schedule() {
        let remedy = "plan the twin with Cpu::like(facts)";
        return Err(Error::invalid("twin", "another schedule", "the device's", remedy));
    }
    let tokens = device.write(inputs)?;
    twin.write(inputs)?;
    (0..device.bound().steps(tokens).len()).map(|at| step(device, twin, spec, tokens, at)).collect()
}

fn step<B: Host>(
    device: &Session<B>,
    twin: &Session<Cpu>,
    spec: &MoeSpec,
    tokens: usize,
    at: usize,
) -> Result<Compared> {
    let (host, cpu) = (device.plan().backend(), twin.plan().backend());
    let schedule = device.plan().schedule();
    let step = &device.bound().steps(tokens)[at];
    let source = step.operation.source();
    let mut shared = vec![];
    for (binding, &index) in source.bindings.iter().zip(&step.buffers) {
        let buffer = &schedule.buffers[index];
        if let (Some(here), Some(there)) = (of(device, buffer), of(twin, buffer)) {
            let before = host.read(here)?;
            cpu.write(there, 0, &before)?;
            shared.push((binding, buffer, here, there, before));
        }
    }
    let mut encoder = host.encoder();
    device.bound().record_steps(&mut encoder, &Tokens::Host(tokens), &|index, _| index == at)?;
    host.submit(encoder)?;
    twin.bound().record_steps(&mut cpu.encoder(), &Tokens::Host(tokens), &|index, _| index == at)?;
    let mut worst = Judged::EXACT;
    for (binding, buffer, here, there, before) in shared {
        let found = host.read(here)?;
        let judged = match binding.access {
            Access::Read | Access::Uniform => exact(&before, &found),
            Access::Write | Access::ReadWrite => judge(&step.operation, spec, buffer, &cpu.read(there)?, &found),
        };
        let complaint = judged.complaint.map(|complaint| format!("{}{complaint}", buffer.name));
        let judged = Judged { complaint, ..judged };
        if worst.complaint.is_none() && (judged.complaint.is_some() || judged.share() > worst.share()) {
            worst = judged;
        }
    }
    let Judged { error, tolerance, complaint } = worst;
    Ok(Compared { step: step.name.clone(), kernel: source.kernel(), error, tolerance, complaint })
}

/// What both sides have of their own: scratch and output. The rest is written before the call, alike.
fn of<'a, B: Host>(session: &'a Session<B>, buffer: &Buffer) -> Option<&'a B::Buffer> {
    if buffer.contents == Contents::Output { session.output() } else { session.scratch().buffer(&buffer.name) }
}

#[derive(Debug, Clone, PartialEq)]
struct Judged {
    error: f64,
    tolerance: f64,
    /// Begins behind the buffer's name.
    complaint: Option<String>,
}

impl Judged {
    const EXACT: Self = Self { error: 0.0, tolerance: 0.0, complaint: None };

    fn share(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.tolerance }
    }
}

/// Integers exactly, sums and scores within their bounds, codes and scales by `quantised`.
fn judge(operation: &Operation, spec: &MoeSpec, buffer: &Buffer, want: &[u32], found: &[u32]) -> Judged {
    let all = want.len().max(1);
    let (tolerance, width) = match operation {
        Operation::Quantize(kernel) => {
            return match kernel.source {
                ValueSource::Rows { input: _, divisor: _, weigh: _ } => exact(want, found),
                ValueSource::Activated(_) => quantised(buffer.name.ends_with(".codes"), want, found),
            };
        }
        Operation::Assign(_)
        | Operation::Permute(_)
        | Operation::Amax(_)
        | Operation::Diagnose(_)
        | Operation::Synthesize(_)
        | Operation::Stream(_) => return exact(want, found),
        Operation::TopkRouting(_) if buffer.contents == Contents::TopkIds => return exact(want, found),
        Operation::TopkRouting(_) | Operation::Activate(_) => (SCORE_TOLERANCE, all),
        Operation::GroupedGemm(gemm) => (product_tolerance(gemm), gemm.features()),
        Operation::Norm(norm) => (sum_tolerance(norm.cols), norm.cols),
        Operation::Combine(_) => (sum_tolerance(16), all),
    };
    // What leaves the layer has the output's type, all else is f32, rounded to the model's type where the spec says.
    let (held, step) = match (buffer.contents, operation) {
        (Contents::Output, _) => (spec.precision.output, spec.precision.output),
        (_, Operation::GroupedGemm(gemm)) if gemm.stored != FloatType::F32 => (gemm.stored, gemm.stored),
        _ if rounds(spec) => (FloatType::F32, spec.precision.model),
        _ => (FloatType::F32, FloatType::F32),
    };
    let count = want.len() * (4 / held.bytes());
    floats(&decode(held, want, count), &decode(held, found, count), width, tolerance, step)
}

/// Of codes, matrix units of warpgroups keep 13 bits behind the largest product of a block, whose magnitude a sum of
/// many blocks need not have.
fn product_tolerance(gemm: &GroupedGemm) -> f64 {
    match (gemm.variant, gemm.input) {
        (
            GemmVariant::Wgmma { rows: _, matrix_blocks: _, matrix_vecs: _ },
            RowValues::Codes { code: _, group: _, scales: _ },
        ) => PROMOTED_TOLERANCE,
        _ => sum_tolerance(gemm.cols),
    }
}

fn sum_tolerance(terms: usize) -> f64 {
    SUM_TOLERANCE * (terms.max(16) as f64).sqrt()
}

fn exact(want: &[u32], found: &[u32]) -> Judged {
    let wrong = || want.iter().zip(found).enumerate().filter(|(_, (want, found))| want != found);
    let complaint = wrong().next().map(|(at, (want, found))| format!("[{at}] is {found:#x}, its twin says {want:#x}"));
    Judged { error: wrong().count() as f64, tolerance: 0.0, complaint }
}

/// Values within `tolerance` of their row's largest. Where they are rounded to `step`'s type, a few may be a step off,
/// and how large a step is says nothing about the kernel: the error is that of other buffers.
fn floats(want: &[f32], found: &[f32], width: usize, tolerance: f64, step: FloatType) -> Judged {
    let step = match step {
        FloatType::F32 => 0.0,
        FloatType::F16 => 2f64.powi(-10),
        FloatType::Bf16 => 2f64.powi(-7),
    };
    let mut judged = Judged { error: 0.0, tolerance, complaint: None };
    let mut flipped = 0;
    for (row, (wants, founds)) in want.chunks(width).zip(found.chunks(width)).enumerate() {
        let finite = wants.iter().copied().filter(|value| value.is_finite());
        let largest = f64::from(finite.fold(1f32, |largest, value| largest.max(value.abs())));
        for (col, (&want, &found)) in wants.iter().zip(founds).enumerate() {
            // NaN stands for NaN: what it should be, or what nobody has written.
            let off = match want == found || want.is_nan() && found.is_nan() {
                true => 0.0,
                false => (f64::from(found) - f64::from(want)).abs() / largest,
            };
            if off <= step {
                flipped += usize::from(off > tolerance);
            } else if off <= tolerance {
                judged.error = judged.error.max(off);
            } else {
                judged.error = if off.is_nan() { f64::INFINITY } else { judged.error.max(off) };
                let at = row * width + col;
                judged.complaint.get_or_insert_with(|| format!("[{at}] is {found}, its twin says {want}"));
            }
        }
    }
    too_many(judged, flipped, want.len())
}

/// Behind an activation, whose `exp` may err: codes within one, scales within ulps.
fn quantised(codes: bool, want: &[u32], found: &[u32]) -> Judged {
    // Codes in order of their values.
    let rank = |word: u32, byte: usize| {
        let code = (word >> (8 * byte)) as u8;
        if code & 0x80 == 0 { i32::from(code) } else { -i32::from(code & 0x7f) }
    };
    let mut judged = Judged { error: 0.0, tolerance: SCALE_TOLERANCE, complaint: None };
    let mut flipped = 0;
    for (at, (&want, &found)) in want.iter().zip(found).enumerate().filter(|(_, (want, found))| want != found) {
        let off = if codes {
            flipped += 1;
            let near = (0..4).all(|byte| (rank(want, byte) - rank(found, byte)).abs() <= 1);
            if near { 0.0 } else { f64::INFINITY }
        } else {
            let [want, found] = [want, found].map(|word| f64::from(f32::from_bits(word)));
            ((want - found) / want).abs()
        };
        judged.error = judged.error.max(if off.is_nan() { f64::INFINITY } else { off });
        if judged.error > SCALE_TOLERANCE {
            judged.complaint.get_or_insert_with(|| format!("[{at}] is {found:#x}, its twin says {want:#x}"));
        }
    }
    too_many(judged, flipped, want.len())
}

fn too_many(mut judged: Judged, flipped: usize, of: usize) -> Judged {
    if flipped * FLIPPED > of.max(FLIPPED) {
        judged.error = f64::INFINITY;
        judged.complaint.get_or_insert_with(|| format!(": {flipped} of {of} values are a step off"));
    }
    judged
}
