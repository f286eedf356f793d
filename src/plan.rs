//! A schedule made ready on a device. Names no kernel: it walks a [`Schedule`].
//!
//! The trait that backends implement stands here with its only user, hence the length.
//!
//! [`Plan`] owns kernels and packed weights; [`Plan::bind`] ties it to the caller's buffers and a
//! [`Scratch`]; [`Bound::record`] writes copies and dispatches into the caller's encoder. It submits
//! nothing, waits for nothing and allocates nothing.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::kernels::Operation;
use crate::kernels::pack::{GroupSource, PackedMatrix};
use crate::schedule::{
    self, Buffer, Contents, DeviceFacts, Gemms, Options, Pace, Part, Schedule, StageSpec, Step, Table,
};
use crate::spec::MoeSpec;
use crate::support::Scope;
use crate::weights::{InputScales, LatentNormWeights, LoraWeights, Matrix, MlpWeights, MoeWeights, RouterWeights};

/// A device API. Everything a backend must do; nothing here has a default.
pub trait Backend: Sized {
    /// Device memory.
    type Buffer: Clone;
    /// A compiled kernel.
    type Kernel;
    /// A kernel's buffers, ready to launch.
    type Binding;
    /// Where work is recorded.
    type Encoder;

    /// What `lower` needs to know.
    fn facts(&self) -> DeviceFacts;
    /// Zeroed memory of `bytes`, a multiple of 4.
    ///
    /// # Errors
    /// The device refuses.
    fn create_buffer(&self, name: &str, bytes: u64, uniform: bool) -> Result<Self::Buffer>;
    /// Size of a buffer.
    fn buffer_bytes(&self, buffer: &Self::Buffer) -> u64;
    /// Whether two handles are one buffer.
    fn same_buffer(&self, a: &Self::Buffer, b: &Self::Buffer) -> bool;
    /// Writes `words` at byte `offset`, before any work recorded later.
    ///
    /// # Errors
    /// The device refuses.
    fn write(&self, buffer: &Self::Buffer, offset: u64, words: &[u32]) -> Result<()>;
    /// Compiles a kernel.
    ///
    /// # Errors
    /// The device refuses.
    fn compile(&self, name: &str, operation: &Operation) -> Result<Self::Kernel>;
    /// Compiles kernels, each with the name of a step that runs it, side by side where the device's API can.
    ///
    /// # Errors
    /// The device refuses; of several refusals the one that stands first.
    fn compile_all(&self, operations: &[(&str, &Operation)]) -> Result<Vec<Self::Kernel>>;
    /// Ties a kernel to buffers, in the order of its bindings.
    ///
    /// # Errors
    /// The device refuses.
    fn bind(&self, kernel: &Self::Kernel, slices: &[BufferSlice<'_, Self>]) -> Result<Self::Binding>;
    /// Records a copy of the word at a byte offset, which lies inside the buffer.
    fn copy_word(&self, encoder: &mut Self::Encoder, from: (&Self::Buffer, u64), to: &Self::Buffer);
    /// Records launches, each after the one before.
    ///
    /// # Errors
    /// Only for backends that run while they record.
    fn launch(&self, encoder: &mut Self::Encoder, launches: &mut dyn Iterator<Item = Launch<'_, Self>>) -> Result<()>;
}

/// A part of a buffer.
pub struct BufferSlice<'a, B: Backend> {
    /// The buffer.
    pub buffer: &'a B::Buffer,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One kernel launch.
pub struct Launch<'a, B: Backend> {
    /// The kernel.
    pub kernel: &'a B::Kernel,
    /// Its buffers.
    pub binding: &'a B::Binding,
    /// Workgroups.
    pub workgroups: [u32; 3],
    /// Byte of its uniform buffer from which it reads, a multiple of [`PARAMS_STRIDE`].
    pub params: u32,
}

/// Bytes from one entry of a uniform buffer to the next: what every device can bind at.
pub const PARAMS_STRIDE: usize = 256;

/// Calls of up to so many tokens find their count in an entry of its own. Others copy it into the first entry, which
/// makes a device wait.
const COUNTED_TOKENS: usize = 64;

/// Whether a layer can be planned, without planning it: the same code decides.
///
/// # Errors
/// The field that this backend lacks, or the rule that the spec breaks.
pub fn supports<B: Backend>(backend: &B, spec: &MoeSpec, max_tokens: usize) -> Result<()> {
    schedule::lower(spec, Scope::Layer, max_tokens, &backend.facts(), &Options::AUTO).map(|_| ())
}

/// How many tokens a call has.
pub enum Tokens<'a, B: Backend> {
    /// Known now.
    Host(usize),
    /// A u32 at this byte offset of a device buffer, at most the plan's `max_tokens`; larger counts are cut.
    Device(&'a B::Buffer, u64),
}

/// The caller's buffers.
pub struct Io<'a, B: Backend> {
    /// [T, H] of the spec's input type.
    pub hidden_states: &'a B::Buffer,
    /// u32 `[T]`; required for hash routing, refused otherwise.
    pub token_ids: Option<&'a B::Buffer>,
    /// [T, H] of the spec's output type; required unless only the routing is planned.
    pub output: Option<&'a B::Buffer>,
    /// i32 [T, k] instead of the scratch's: written by the routing, read by the experts.
    pub topk_ids: Option<&'a B::Buffer>,
    /// f32 [T, k] instead of the scratch's; with a batched entry f32 `[T]`, required if weights act inside of the
    /// experts, refused otherwise.
    pub topk_weights: Option<&'a B::Buffer>,
    /// [T, H] of the spec's input type; required if the experts read another input, refused otherwise.
    pub expert_hidden_states: Option<&'a B::Buffer>,
    /// f32 [T, outputs]; required if the spec says that the logits are given, refused otherwise.
    pub logits: Option<&'a B::Buffer>,
    /// f32 [T, S], what the previous layer left in `router_states`; required if a state enters the
    /// router, refused otherwise.
    pub previous_router_states: Option<&'a B::Buffer>,
    /// f32 [T, S] instead of the scratch's: the router's state for the next layer. Two layers that share a
    /// scratch need it: one's state may not be written over while the next reads it.
    pub router_states: Option<&'a B::Buffer>,
    /// f32 [T, n] instead of the scratch's: the shares of joint normalisation.
    pub shared_weights: Option<&'a B::Buffer>,
    /// i32 `[T]`, -1 for none; required if there are adapters, refused otherwise.
    pub adapter_ids: Option<&'a B::Buffer>,
    /// u32 `[slots]`, rows of each slot; required for a batched entry, refused otherwise.
    pub counts: Option<&'a B::Buffer>,
    /// i32 [E, replicas] instead of the spec's table, for [`Placement::Map`](crate::spec::Placement); what an encoder
    /// writes there holds from the next recorded call on. Whose weights a slot has is the caller's matter.
    pub expert_slots: Option<&'a B::Buffer>,
}

impl<'a, B: Backend> Io<'a, B> {
    /// Hidden states and nothing else.
    pub fn of(hidden_states: &'a B::Buffer) -> Self {
        Self {
            hidden_states,
            token_ids: None,
            output: None,
            topk_ids: None,
            topk_weights: None,
            expert_hidden_states: None,
            logits: None,
            previous_router_states: None,
            router_states: None,
            shared_weights: None,
            adapter_ids: None,
            counts: None,
            expert_slots: None,
        }
    }
}

/// Names and sizes of the buffers between the steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScratchLayout {
    /// (name, bytes).
    pub buffers: Vec<(String, u64)>,
}

impl ScratchLayout {
    /// A layout that serves both: sixty layers share one scratch, one stream at a time.
    #[must_use]
    pub fn union(mut self, other: &Self) -> Self {
        for (name, bytes) in &other.buffers {
            match self.buffers.iter_mut().find(|(known, _)| known == name) {
                Some((_, size)) => *size = (*size).max(*bytes),
                None => self.buffers.push((name.clone(), *bytes)),
            }
        }
        self
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.buffers.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Memory between the steps. Contents are undefined before and after a call, but for `topk_ids`,
/// `topk_weights`, and where the spec has them `shared_weights` and `router_states`.
pub struct Scratch<B: Backend> {
    buffers: Vec<(String, B::Buffer)>,
}

impl<B: Backend> Scratch<B> {
    /// Allocates a layout.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(backend: &B, layout: &ScratchLayout) -> Result<Self> {
        let create = |(name, bytes): &(String, u64)| Ok((name.clone(), backend.create_buffer(name, *bytes, false)?));
        Ok(Self { buffers: layout.buffers.iter().map(create).collect::<Result<_>>()? })
    }

    /// Takes the caller's memory: storage buffers by the names of a layout.
    pub fn from_buffers(buffers: Vec<(String, B::Buffer)>) -> Self {
        Self { buffers }
    }

    /// The buffer of that name, e.g. `topk_ids` i32 [T, k] and `topk_weights` f32 [T, k] after a call.
    pub fn buffer(&self, name: &str) -> Option<&B::Buffer> {
        self.buffers.iter().find(|(known, _)| known == name).map(|(_, buffer)| buffer)
    }
}

/// A layer ready on a device: kernels and packed weights.
pub struct Plan<B: Backend> {
    inner: Arc<Inner<B>>,
}

struct Inner<B: Backend> {
    backend: B,
    schedule: Schedule,
    /// Buffers that the plan owns, by index in the schedule.
    owned: Vec<Option<B::Buffer>>,
    /// A kernel for each step of each bucket; steps of one operation share one.
    kernels: Vec<B::Kernel>,
    kernel_of: Vec<Vec<usize>>,
    /// 0, 1, 2, ... `max_tokens`: the encoder copies a count from here, so that `record` needs no queue.
    counts: B::Buffer,
}

impl<B: Backend> Plan<B> {
    /// Plans a layer: lowers, compiles, packs and uploads.
    ///
    /// # Errors
    /// A spec, weights or call that break a rule, a part that the backend lacks, a refusing device.
    pub fn new(
        backend: B,
        spec: &MoeSpec,
        weights: &MoeWeights<'_>,
        max_tokens: usize,
        options: &Options,
    ) -> Result<Self> {
        Self::with_progress(backend, spec, weights, max_tokens, options, &mut |_, _| {})
    }

    /// As [`Plan::new`], and `progress` hears how many bytes of how many are packed and written, some megabytes
    /// apart: large layers take seconds.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_progress(
        backend: B,
        spec: &MoeSpec,
        weights: &MoeWeights<'_>,
        max_tokens: usize,
        options: &Options,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let schedule = schedule::lower(spec, Scope::Layer, max_tokens, &backend.facts(), options)?;
        weights.check(spec)?;
        let (fill, all) = (fill(&weights.router, Some(weights)), schedule.weight_bytes());
        let heard = RefCell::new((0, progress));
        let fill = |schedule: &Schedule, buffer: &Buffer, write: Write<'_>| {
            fill(schedule, buffer, &mut |first, words| {
                write(first, words)?;
                let (done, progress) = &mut *heard.borrow_mut();
                *done += 4 * words.len() as u64;
                progress(*done, all);
                Ok(())
            })
        };
        Self::from_schedule(backend, schedule, &fill)
    }

    /// Plans the routing alone: ids and weights.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn routing(
        backend: B,
        spec: &MoeSpec,
        router: &RouterWeights<'_>,
        max_tokens: usize,
        options: &Options,
    ) -> Result<Self> {
        let schedule = schedule::lower(spec, Scope::Routing, max_tokens, &backend.facts(), options)?;
        router.check(spec)?;
        Self::from_schedule(backend, schedule, &fill(router, None))
    }

    /// Plans one stage without a layer around it: an activation, the quantisation of rows, or both in one step. Ids and
    /// weights alone are [`Plan::routing`]; single steps of a layer [`Bound::record_steps`].
    ///
    /// A plan like any other: [`Io::hidden_states`] are the rows that enter, [`Io::output`] those that leave, scales
    /// stand in the scratch's buffer [`schedule::SCALES`].
    ///
    /// # Errors
    /// As [`schedule::stage`], and a refusing device.
    ///
    /// # Example
    ///
    /// Clamped SwiGLU and FP8 codes of 4 columns behind a host's own GEMM:
    ///
    /// ```
    /// use moewe::backend::cpu::{CpuBuffer, CpuEncoder};
    /// use moewe::kernels::{Activated, ScaleLayout, ValueSource};
    /// use moewe::schedule::{Codes, SCALES, StageSpec};
    /// use moewe::spec::{Activation, ActivationQuant, ActivationRounding, ActivationScale, FloatType, Rounding};
    /// use moewe::{Backend, Cpu, Io, Plan, Scratch, Tokens};
    ///
    /// # fn main() -> moewe::Result<()> {
    /// let activated = Activated {
    ///     activation: Activation::Swiglu { limit: Some(7.0) },
    ///     gate_up: Rounding::F32,
    ///     rounding: ActivationRounding::F32,
    ///     weighted: false,
    /// };
    /// let quant = ActivationQuant::dynamic_fp8(4, ActivationScale::F32);
    /// let codes = Some(Codes { quant, layout: ScaleLayout::RowMajor });
    /// let spec = StageSpec { source: ValueSource::Activated(activated), cols: 4, codes, model: FloatType::F32 };
    ///
    /// let backend = Cpu::new();
    /// let plan = Plan::stage(backend, &spec, 1)?;
    /// let scratch = Scratch::new(&backend, &plan.scratch_layout())?;
    /// // One row; gate and up alternate.
    /// let gate_up = [100.0f32, 1.0, 100.0, 2.0, 100.0, 100.0, 0.0, 1.0];
    /// let rows = CpuBuffer::from_words(gate_up.map(f32::to_bits).to_vec());
    /// let codes = backend.create_buffer("codes", 4, false)?;
    /// let bound = plan.bind(&Io { output: Some(&codes), ..Io::of(&rows) }, &scratch)?;
    /// bound.record(&mut CpuEncoder, &Tokens::Host(1))?;
    ///
    /// // silu(7) = 6.99363, and up is bounded by 7 too: the largest value is 448 scales, code 0x7e.
    /// let scales = scratch.buffer(SCALES).map(CpuBuffer::to_words).unwrap_or_default();
    /// assert!((f32::from_bits(scales[0]) - 7.0 * 6.99363 / 448.0).abs() < 1e-6);
    /// assert_eq!(codes.to_words()[0].to_le_bytes()[2..], [0x7e, 0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn stage(backend: B, spec: &StageSpec, max_tokens: usize) -> Result<Self> {
        let schedule = schedule::stage(spec, max_tokens, &backend.facts())?;
        Self::from_schedule(backend, schedule, &|_, _, _| Ok(()))
    }

    /// Plans a schedule whose own buffers `fill` writes.
    pub(crate) fn from_schedule(backend: B, schedule: Schedule, fill: Fill<'_>) -> Result<Self> {
        let mut operations: Vec<(&str, &Operation)> = vec![];
        let mut kernel_of = vec![];
        for bucket in &schedule.buckets {
            let mut row = vec![];
            for step in &bucket.steps {
                let known = operations.iter().position(|(_, operation)| **operation == step.operation);
                row.push(known.unwrap_or(operations.len()));
                if known.is_none() {
                    operations.push((&step.name, &step.operation));
                }
            }
            kernel_of.push(row);
        }
        let kernels = backend.compile_all(&operations)?;
        let mut owned = vec![];
        for buffer in &schedule.buffers {
            owned.push(match buffer.contents {
                Contents::HiddenStates
                | Contents::TokenIds
                | Contents::Output
                | Contents::TopkIds
                | Contents::TopkWeights
                | Contents::ExpertHiddenStates
                | Contents::AdapterIds
                | Contents::Counts
                | Contents::RowWeights
                | Contents::GivenLogits
                | Contents::PreviousRouterStates
                | Contents::RouterStates
                | Contents::SharedWeights
                | Contents::Scratch
                | Contents::Params => None,
                Contents::Segment { matrix: _, segment: _ }
                | Contents::Spans { matrix: _, segment: _ }
                | Contents::Table(_) => {
                    let target = backend.create_buffer(&buffer.name, buffer.bytes, false)?;
                    fill(&schedule, buffer, &mut |word, words| backend.write(&target, 4 * word as u64, words))?;
                    Some(target)
                }
            });
        }
        let words: Vec<u32> = (0..=schedule.max_tokens as u32).collect();
        let counts = backend.create_buffer("counts", 4 * words.len() as u64, false)?;
        backend.write(&counts, 0, &words)?;
        Ok(Self { inner: Arc::new(Inner { backend, schedule, owned, kernels, kernel_of, counts }) })
    }

    /// What will run.
    pub fn schedule(&self) -> &Schedule {
        &self.inner.schedule
    }

    /// The backend it was planned on.
    pub fn backend(&self) -> &B {
        &self.inner.backend
    }

    /// The plan's own buffers, each with what it holds.
    #[cfg(feature = "cli")]
    pub(crate) fn owned(&self) -> impl Iterator<Item = (Contents, &B::Buffer)> {
        let Inner { schedule, owned, backend: _, kernels: _, kernel_of: _, counts: _ } = &*self.inner;
        let held = schedule.buffers.iter().zip(owned);
        held.filter_map(|(buffer, owned)| Some((buffer.contents, owned.as_ref()?)))
    }

    /// The scratch it needs.
    pub fn scratch_layout(&self) -> ScratchLayout {
        let scratch = self.inner.schedule.buffers.iter().filter(|buffer| buffer.contents.is_scratch());
        ScratchLayout { buffers: scratch.map(|buffer| (buffer.name.clone(), buffer.bytes)).collect() }
    }

    /// Ties the plan to the caller's buffers. Buffers may be shorter than `max_tokens` needs; then
    /// [`Bound::max_tokens`] is smaller.
    ///
    /// # Errors
    /// A buffer that is missing, surplus, too short or given twice.
    pub fn bind(&self, io: &Io<'_, B>, scratch: &Scratch<B>) -> Result<Bound<B>> {
        let Inner { backend, schedule, owned, kernels, kernel_of, counts: _ } = &*self.inner;
        let mut found: Vec<Option<B::Buffer>> = vec![];
        let mut max_tokens = schedule.max_tokens;
        for (buffer, owned) in schedule.buffers.iter().zip(owned) {
            let name = buffer.name.as_str();
            let in_scratch = || scratch.buffer(name);
            let given = match buffer.contents {
                Contents::HiddenStates => Some(io.hidden_states),
                Contents::TokenIds => io.token_ids,
                Contents::ExpertHiddenStates => io.expert_hidden_states,
                Contents::AdapterIds => io.adapter_ids,
                Contents::Counts => io.counts,
                Contents::RowWeights => io.topk_weights,
                Contents::GivenLogits => io.logits,
                Contents::PreviousRouterStates => io.previous_router_states,
                Contents::Output => io.output,
                Contents::RouterStates => io.router_states.or_else(in_scratch),
                Contents::SharedWeights => io.shared_weights.or_else(in_scratch),
                Contents::TopkIds => io.topk_ids.or_else(in_scratch),
                Contents::TopkWeights => io.topk_weights.or_else(in_scratch),
                Contents::Scratch => in_scratch(),
                Contents::Params => {
                    found.push(None);
                    continue;
                }
                Contents::Table(Table::ExpertSlots) => io.expert_slots.or(owned.as_ref()),
                Contents::Segment { matrix: _, segment: _ }
                | Contents::Spans { matrix: _, segment: _ }
                | Contents::Table(_) => owned.as_ref(),
            };
            let given = given.ok_or_else(|| {
                Error::invalid(name.to_string(), "no buffer", format!("one of {} bytes", buffer.bytes), "give it")
            })?;
            let bytes = backend.buffer_bytes(given);
            match buffer.token_bytes {
                Some(per_token) => {
                    // Whole words: an odd row of 16-bit values needs its last word.
                    let fits = (0..=max_tokens).rev().find(|&n| (per_token * n as u64).next_multiple_of(4) <= bytes);
                    max_tokens = fits.unwrap_or(0);
                    if max_tokens == 0 {
                        return Err(too_short(name, bytes, per_token.next_multiple_of(4)));
                    }
                }
                None if bytes < buffer.bytes => return Err(too_short(name, bytes, buffer.bytes)),
                None => {}
            }
            found.push(Some(given.clone()));
        }
        self.refuse_surplus(io)?;
        self.refuse_aliases(&found)?;
        let mut chunks = vec![];
        for first in (0..max_tokens).step_by(schedule.chunk_tokens) {
            let tokens = schedule.chunk_tokens.min(max_tokens - first);
            let entries = if first == 0 { 1 + tokens.min(COUNTED_TOKENS) } else { 1 };
            let mut words = vec![0; entries * PARAMS_STRIDE / 4];
            for (entry, words) in words.chunks_exact_mut(PARAMS_STRIDE / 4).enumerate() {
                words[..3].copy_from_slice(&[entry as u32, first as u32, tokens as u32]);
            }
            let params = backend.create_buffer("params", 4 * words.len() as u64, true)?;
            backend.write(&params, 0, &words)?;
            let mut bindings = vec![];
            for (bucket, kernel_of) in schedule.buckets.iter().zip(kernel_of) {
                let mut row = vec![];
                for (step, &kernel) in bucket.steps.iter().zip(kernel_of) {
                    let slice = |index: &usize| {
                        let decl = &schedule.buffers[*index];
                        let (offset, bytes) = match decl.token_bytes {
                            Some(per_token) => (per_token * first as u64, per_token * tokens as u64),
                            None => (0, decl.bytes),
                        };
                        let buffer = found[*index].as_ref().unwrap_or(&params);
                        BufferSlice { buffer, offset, bytes: bytes.next_multiple_of(4) }
                    };
                    let slices: Vec<_> = step.buffers.iter().map(slice).collect();
                    row.push(backend.bind(&kernels[kernel], &slices)?);
                }
                bindings.push(row);
            }
            chunks.push(Chunk { first, tokens, params, bindings });
        }
        Ok(Bound { inner: Arc::clone(&self.inner), max_tokens, chunks })
    }

    fn refuse_surplus(&self, io: &Io<'_, B>) -> Result<()> {
        let wants = |contents| self.inner.schedule.buffers.iter().any(|buffer| buffer.contents == contents);
        for (name, given, contents) in [
            ("token_ids", io.token_ids.is_some(), Contents::TokenIds),
            ("expert_hidden_states", io.expert_hidden_states.is_some(), Contents::ExpertHiddenStates),
            ("logits", io.logits.is_some(), Contents::GivenLogits),
            ("previous_router_states", io.previous_router_states.is_some(), Contents::PreviousRouterStates),
            ("router_states", io.router_states.is_some(), Contents::RouterStates),
            ("shared_weights", io.shared_weights.is_some(), Contents::SharedWeights),
            ("output", io.output.is_some(), Contents::Output),
            ("adapter_ids", io.adapter_ids.is_some(), Contents::AdapterIds),
            ("counts", io.counts.is_some(), Contents::Counts),
            ("expert_slots", io.expert_slots.is_some(), Contents::Table(Table::ExpertSlots)),
            ("topk_ids", io.topk_ids.is_some(), Contents::TopkIds),
            ("topk_weights", io.topk_weights.is_some() && !wants(Contents::TopkWeights), Contents::RowWeights),
        ] {
            if given && !wants(contents) {
                return Err(Error::invalid(name, "a buffer", "none", "this plan does not use it: pass None"));
            }
        }
        Ok(())
    }

    /// No buffer may stand for two contents: a kernel would read what another writes.
    fn refuse_aliases(&self, found: &[Option<B::Buffer>]) -> Result<()> {
        let buffers = &self.inner.schedule.buffers;
        for (at, a) in found.iter().enumerate() {
            for (other, b) in found.iter().enumerate().take(at) {
                let (Some(a), Some(b)) = (a, b) else { continue };
                if self.inner.backend.same_buffer(a, b) {
                    return Err(Error::invalid(
                        buffers[at].name.clone(),
                        format!("the buffer that is also {}", buffers[other].name),
                        "a buffer of its own",
                        "give input, output and scratch different buffers",
                    ));
                }
            }
        }
        Ok(())
    }
}

fn too_short(name: &str, found: u64, expected: u64) -> Error {
    Error::invalid(
        name.to_string(),
        format!("{found} bytes"),
        format!("at least {expected} bytes"),
        "allocate a larger buffer",
    )
}

/// Writes words of a buffer: `write(first word, words)`.
pub(crate) type Write<'a> = &'a mut dyn FnMut(usize, &[u32]) -> Result<()>;
/// Writes what a buffer of the plan's own holds.
pub(crate) type Fill<'a> = &'a dyn Fn(&Schedule, &Buffer, Write<'_>) -> Result<()>;

/// What a plan of these weights writes.
pub(crate) fn fill<'a>(
    router: &'a RouterWeights<'a>,
    weights: Option<&'a MoeWeights<'a>>,
) -> impl Fn(&Schedule, &Buffer, Write<'_>) -> Result<()> {
    move |schedule, buffer, write| match buffer.contents {
        Contents::Segment { matrix, segment } => {
            let packed = &schedule.matrices[matrix];
            packed.pack(segment, &|group| source(packed, group, router, weights), write)
        }
        Contents::Spans { matrix, segment } => write(0, &schedule.matrices[matrix].span_table(segment)),
        Contents::Table(which) => match table(which, schedule, router, weights) {
            Some(words) if 4 * words.len() as u64 == buffer.bytes => write(0, &words),
            found => Err(Error::invalid(
                buffer.name.clone(),
                found.map_or("none".into(), |words| format!("{} values", words.len())),
                format!("{} bytes", buffer.bytes),
                "make weights and spec agree",
            )),
        },
        Contents::HiddenStates
        | Contents::TokenIds
        | Contents::Output
        | Contents::TopkIds
        | Contents::TopkWeights
        | Contents::ExpertHiddenStates
        | Contents::AdapterIds
        | Contents::Counts
        | Contents::RowWeights
        | Contents::GivenLogits
        | Contents::PreviousRouterStates
        | Contents::RouterStates
        | Contents::SharedWeights
        | Contents::Scratch
        | Contents::Params => Ok(()),
    }
}

/// The words of a table, if the weights have it.
fn table(
    which: Table,
    schedule: &Schedule,
    router: &RouterWeights<'_>,
    weights: Option<&MoeWeights<'_>>,
) -> Option<Vec<u32>> {
    let mlp = router.mlp.as_ref();
    let norm = weights.and_then(|weights| weights.latent.as_ref()).map(|latent| &latent.norm);
    let values: Option<&[f32]> = match which {
        // The schedule has it.
        Table::ExpertSlots => return Some(bytemuck::cast_slice(&schedule.expert_slots).to_vec()),
        Table::Tid2eid => return router.tid2eid.as_deref().map(|ids| bytemuck::cast_slice(ids).to_vec()),
        Table::SelectionBias => router.selection_bias.as_deref(),
        Table::PerExpertScale => router.per_expert_scale.as_deref(),
        Table::GlobalScale => router.global_scale.as_ref().map(std::slice::from_ref),
        Table::RouterInputScale => router.input_scale.as_deref(),
        Table::RouterStatesScale => mlp.and_then(|mlp| mlp.states_scale.as_deref()),
        Table::RouterNorm => mlp.map(|mlp| mlp.norm.as_slice()),
        Table::LatentPreNorm | Table::LatentPostNorm | Table::LatentReducedNorm => match (norm, which) {
            (Some(LatentNormWeights::PreAndPost { pre, post: _ }), Table::LatentPreNorm) => Some(pre),
            (Some(LatentNormWeights::PreAndPost { pre: _, post }), Table::LatentPostNorm) => Some(post),
            (Some(LatentNormWeights::Reduced(weight)), Table::LatentReducedNorm) => Some(weight),
            (_, _) => None,
        },
        Table::ExpertInputScales(gemm) => return Some(input_scales(weights.map(|weights| &weights.experts), gemm)),
        Table::SharedInputScales(gemm) => return Some(input_scales(weights.map(|weights| &weights.shared), gemm)),
        Table::OutputBias => weights.and_then(|weights| weights.output_bias.as_deref()),
        Table::OutputNorm => weights.and_then(|weights| weights.output_norm.as_deref()),
    };
    values.map(|values| bytemuck::cast_slice(values).to_vec())
}

/// The static scales of what enters a GEMM; `MoeWeights::check` has seen to it that each MLP has them.
fn input_scales(mlps: Option<&Vec<MlpWeights<'_>>>, gemm: Gemms) -> Vec<u32> {
    let one = |scales: &InputScales| match gemm {
        Gemms::GateUp => scales.gate_up.to_bits(),
        Gemms::Down => scales.down.to_bits(),
    };
    mlps.into_iter().flatten().filter_map(|mlp| mlp.input_scales.as_ref()).map(one).collect()
}

/// Group adapter * slots + slot.
fn lora<'a>(weights: Option<&'a MoeWeights<'a>>, group: usize) -> Option<&'a LoraWeights<'a>> {
    let weights = weights?;
    let slots = weights.experts.len().max(1);
    weights.lora.get(group / slots)?.get(group % slots)
}

/// Where the rows of a packed matrix come from.
fn source<'a>(
    packed: &PackedMatrix,
    group: usize,
    router: &'a RouterWeights<'a>,
    weights: Option<&'a MoeWeights<'a>>,
) -> Result<GroupSource<'a>> {
    let gate_up = |mlp: &'a MlpWeights<'a>| GroupSource {
        matrices: mlp.gate.iter().chain([&mlp.up]).collect(),
        biases: mlp.gate_bias.iter().chain(&mlp.up_bias).map(Vec::as_slice).collect(),
    };
    let down = |mlp: &'a MlpWeights<'a>| GroupSource {
        matrices: vec![&mlp.down],
        biases: mlp.down_bias.iter().map(Vec::as_slice).collect(),
    };
    let biased = |matrix: &'a Matrix<'a>, bias: &'a [f32]| GroupSource { matrices: vec![matrix], biases: vec![bias] };
    let plain = |matrix: &'a Matrix<'a>| GroupSource { matrices: vec![matrix], biases: vec![] };
    let mlp = router.mlp.as_ref();
    let latent = weights.and_then(|weights| weights.latent.as_ref());
    let found = match packed.name {
        "router_gemm" => router.weight.as_ref().map(|weight| GroupSource {
            matrices: vec![weight],
            biases: router.bias.iter().map(Vec::as_slice).collect(),
        }),
        "router.down" => mlp.map(|mlp| biased(&mlp.down, &mlp.down_bias)),
        "router.fc1" => mlp.map(|mlp| biased(&mlp.fc1, &mlp.fc1_bias)),
        "router.fc2" => mlp.map(|mlp| biased(&mlp.fc2, &mlp.fc2_bias)),
        "router.out" => mlp.map(|mlp| plain(&mlp.out)),
        "experts.gate_up" => weights.and_then(|weights| weights.experts.get(group)).map(gate_up),
        "experts.down" => weights.and_then(|weights| weights.experts.get(group)).map(down),
        "lora.gate_up_a" => lora(weights, group).map(|lora| plain(&lora.gate_up_a)),
        "lora.gate_up_b" => lora(weights, group)
            .map(|lora| GroupSource { matrices: lora.gate_b.iter().chain([&lora.up_b]).collect(), biases: vec![] }),
        "lora.down_a" => lora(weights, group).map(|lora| plain(&lora.down_a)),
        "lora.down_b" => lora(weights, group).map(|lora| plain(&lora.down_b)),
        "shared.gate_up" => weights.and_then(|weights| weights.shared.get(group)).map(gate_up),
        "shared.down" => weights.and_then(|weights| weights.shared.get(group)).map(down),
        "shared.gate" => weights.and_then(|weights| weights.shared_gate.as_ref()).map(plain),
        "latent.down" => latent.map(|latent| plain(&latent.down)),
        "latent.up" => latent.map(|latent| plain(&latent.up)),
        _ => None,
    };
    let found = found.ok_or_else(|| {
        Error::invalid(packed.name, format!("no weights for group {group}"), "some", "make weights and spec agree")
    })?;
    packed.require(&found)?;
    Ok(found)
}

/// A plan with its buffers.
pub struct Bound<B: Backend> {
    inner: Arc<Inner<B>>,
    max_tokens: usize,
    chunks: Vec<Chunk<B>>,
}

struct Chunk<B: Backend> {
    first: usize,
    tokens: usize,
    params: B::Buffer,
    /// By bucket and step.
    bindings: Vec<Vec<B::Binding>>,
}

impl<B: Backend> Bound<B> {
    /// Most tokens that plan and buffers allow.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Records the whole plan.
    ///
    /// # Errors
    /// More tokens than [`Bound::max_tokens`].
    pub fn record(&self, encoder: &mut B::Encoder, tokens: &Tokens<'_, B>) -> Result<()> {
        self.record_steps(encoder, tokens, &|_, _| true)
    }

    /// Records ids and weights only.
    ///
    /// # Errors
    /// As [`Bound::record`].
    pub fn record_routing(&self, encoder: &mut B::Encoder, tokens: &Tokens<'_, B>) -> Result<()> {
        self.record_steps(encoder, tokens, &|_, step| step.part == Part::Routing)
    }

    /// Records everything behind ids and weights, which the caller has written: ids that can be selected (of
    /// experts, then of zero experts), or -1 for no contribution; any other makes the token's row NaN. Under
    /// joint normalisation the shares are the caller's too.
    ///
    /// # Errors
    /// As [`Bound::record`].
    pub fn record_experts(&self, encoder: &mut B::Encoder, tokens: &Tokens<'_, B>) -> Result<()> {
        self.record_steps(encoder, tokens, &|_, step| step.part == Part::Experts)
    }

    /// Records the steps that `wanted` picks by position and step: for timing and comparing single steps.
    ///
    /// # Errors
    /// As [`Bound::record`].
    pub fn record_steps(
        &self,
        encoder: &mut B::Encoder,
        tokens: &Tokens<'_, B>,
        wanted: &dyn Fn(usize, &Step) -> bool,
    ) -> Result<()> {
        self.record_where(encoder, tokens, &|_| true, &|(_, at), step| wanted(at, step))
    }

    /// A call in submissions that take no longer than `pace` says: one after the other in this order, each recorded by
    /// [`Bound::record_slice`] for the same tokens. They give the bits of [`Bound::record`]; the scratch and what the
    /// call reads are its own until the last is done. For a queue that a user interface shares, whose own submissions
    /// go between them, and for drivers that give up a submission of seconds.
    ///
    /// A slice is as many steps as fit, at least one: plan with [`Options::pace`], so that no step alone takes longer.
    /// Times are estimates at worst ([`Schedule::work`]), for as many tokens as `tokens` may be.
    ///
    /// # Errors
    /// As [`Bound::record`].
    ///
    /// # Example
    ///
    /// ```
    /// # use std::path::Path;
    /// use moewe::backend::cpu::{CpuBuffer, CpuEncoder};
    /// use moewe::{Backend, Cpu, Io, Options, Pace, Plan, Scratch, Tokens};
    /// # use moewe::families::{Request, resolve};
    /// # use moewe::spec::{ActivationQuant, FloatType};
    /// # fn main() -> moewe::Result<()> {
    /// # let checkpoint = moewe::Checkpoint::open(Path::new("tests/golden/mixtral"))?;
    /// # let (input, output) = (FloatType::F32, FloatType::F32);
    /// # let request = Request { layer: None, input, output, activations: ActivationQuant::None };
    /// # let resolved = resolve(&checkpoint, &request)?;
    /// # let (spec, weights) = (&resolved.spec, resolved.weights(&checkpoint)?);
    /// # let (backend, tokens) = (Cpu::new(), 64);
    ///
    /// let pace = Pace::DESKTOP;
    /// let plan = Plan::new(backend, spec, &weights, tokens, &Options { pace: Some(pace), ..Options::AUTO })?;
    /// # let scratch = Scratch::new(&backend, &plan.scratch_layout())?;
    /// # let hidden_states = CpuBuffer::from_words(vec![0; tokens * spec.hidden_size]);
    /// # let output = backend.create_buffer("output", 4 * (tokens * spec.hidden_size) as u64, false)?;
    /// let bound = plan.bind(&Io { output: Some(&output), ..Io::of(&hidden_states) }, &scratch)?;
    /// for slice in bound.slices(&Tokens::Host(tokens), pace)? {
    ///     // On a GPU: an encoder of its own, and a submission behind it.
    ///     bound.record_slice(&mut CpuEncoder, &Tokens::Host(tokens), &slice)?;
    ///     assert!(slice.estimate <= pace.longest);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn slices(&self, tokens: &Tokens<'_, B>, pace: Pace) -> Result<Slices<'_, B>> {
        Ok(Slices { bound: self, pace, count: self.count(tokens)?, next: (0, 0) })
    }

    /// Records a part of a call; see [`Bound::slices`].
    ///
    /// # Errors
    /// As [`Bound::record`].
    pub fn record_slice(&self, encoder: &mut B::Encoder, tokens: &Tokens<'_, B>, slice: &Slice) -> Result<()> {
        let Slice { first, end, estimate: _ } = *slice;
        // Of a chunk without a step in it not even the count is copied.
        let touched = |chunk| first.0 <= chunk && (chunk, 0) < end;
        self.record_where(encoder, tokens, &touched, &|place, _| first <= place && place < end)
    }

    /// Tokens of a call at most.
    fn count(&self, tokens: &Tokens<'_, B>) -> Result<usize> {
        match *tokens {
            Tokens::Host(count) if count > self.max_tokens => Err(Error::invalid(
                "tokens",
                count,
                format!("at most {}", self.max_tokens),
                "plan for more tokens and give larger buffers",
            )),
            Tokens::Host(count) => Ok(count),
            Tokens::Device(_, _) => Ok(self.max_tokens),
        }
    }

    /// Records the steps of a place (chunk, step) that is wanted, of the chunks that are.
    fn record_where(
        &self,
        encoder: &mut B::Encoder,
        tokens: &Tokens<'_, B>,
        wanted_chunk: &dyn Fn(usize) -> bool,
        wanted: &dyn Fn((usize, usize), &Step) -> bool,
    ) -> Result<()> {
        let Inner { backend, schedule, owned: _, kernels, kernel_of, counts } = &*self.inner;
        let count = self.count(tokens)?;
        let from = match *tokens {
            Tokens::Host(count) => (counts, 4 * count as u64),
            Tokens::Device(buffer, offset) => (buffer, offset),
        };
        let chunks = self.chunks.iter().enumerate().take_while(|(_, chunk)| chunk.first < count);
        for (number, chunk) in chunks.filter(|(number, _)| wanted_chunk(*number)) {
            if from.1 % 4 != 0 || from.1.saturating_add(4) > backend.buffer_bytes(from.0) {
                return Err(Error::invalid(
                    "tokens",
                    format!("byte offset {} of {} bytes", from.1, backend.buffer_bytes(from.0)),
                    "a multiple of 4 inside the buffer",
                    "correct the offset of the count",
                ));
            }
            let params = match *tokens {
                Tokens::Host(count) if chunk.first == 0 && count <= COUNTED_TOKENS => (count * PARAMS_STRIDE) as u32,
                Tokens::Host(_) | Tokens::Device(_, _) => {
                    backend.copy_word(encoder, from, &chunk.params);
                    0
                }
            };
            let tokens = chunk.tokens.min(count - chunk.first);
            let bucket = schedule.bucket(tokens);
            let steps = schedule.buckets[bucket].steps.iter().enumerate();
            let mut launches = steps.filter(|(at, step)| wanted((number, *at), step)).map(|(at, step)| Launch {
                kernel: &kernels[kernel_of[bucket][at]],
                binding: &chunk.bindings[bucket][at],
                workgroups: step.grid.workgroups(tokens),
                params,
            });
            backend.launch(encoder, &mut launches)?;
        }
        Ok(())
    }

    /// The steps that a call with `tokens` tokens runs (those of its first chunk).
    pub fn steps(&self, tokens: usize) -> &[Step] {
        let schedule = &self.inner.schedule;
        &schedule.buckets[schedule.bucket(tokens.min(schedule.chunk_tokens))].steps
    }
}

/// A part of a call: steps that follow each other, of one chunk or of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Chunk and step that it begins with.
    pub first: (usize, usize),
    /// Chunk and step that it does not reach.
    pub end: (usize, usize),
    /// How long it may take.
    pub estimate: Duration,
}

/// The parts of a call, in order; see [`Bound::slices`].
pub struct Slices<'a, B: Backend> {
    bound: &'a Bound<B>,
    pace: Pace,
    count: usize,
    next: (usize, usize),
}

impl<B: Backend> Iterator for Slices<'_, B> {
    type Item = Slice;

    fn next(&mut self) -> Option<Slice> {
        let schedule = &self.bound.inner.schedule;
        let first = self.next;
        let mut estimate = Duration::ZERO;
        for (number, chunk) in self.bound.chunks.iter().enumerate().skip(first.0) {
            if chunk.first >= self.count {
                break;
            }
            let tokens = chunk.tokens.min(self.count - chunk.first);
            let steps = &schedule.buckets[schedule.bucket(tokens)].steps;
            while self.next.1 < steps.len() {
                let time = schedule.work(&steps[self.next.1], tokens).time(self.pace.rates);
                let longer = estimate.saturating_add(time);
                if longer > self.pace.longest && self.next != first {
                    return Some(Slice { first, end: self.next, estimate });
                }
                estimate = longer;
                self.next.1 += 1;
            }
            self.next = (number + 1, 0);
        }
        (self.next != first).then_some(Slice { first, end: self.next, estimate })
    }
}
