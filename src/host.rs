//! A host of its own for the tool, the tests and the benches: opens adapters, submits, waits, reads back.
//!
//! The library proper never blocks; programs with a device of their own use [`Plan`] directly.
//! A long file: what is host in the library stands in it and nowhere else.

use std::time::Instant;

use crate::backend::cpu::{Cpu, CpuBuffer, CpuEncoder};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, CudaBuffer, CudaEncoder};
use crate::error::{Error, Result};
use crate::numerics;
use crate::plan::{Backend, Bound, Io, Plan, Scratch, Tokens};
use crate::reference::Inputs;
use crate::schedule::Contents;
use crate::spec::{FloatType, Router};

/// A backend that can be driven to completion from here.
pub trait Host: Backend {
    /// Where work is recorded next.
    fn encoder(&self) -> Self::Encoder;
    /// Runs what was recorded and waits for it.
    ///
    /// # Errors
    /// The device fails.
    fn submit(&self, encoder: Self::Encoder) -> Result<()>;
    /// A buffer with these words, for input or output.
    ///
    /// # Errors
    /// The device refuses.
    fn upload(&self, name: &str, words: &[u32]) -> Result<Self::Buffer> {
        let buffer = self.create_buffer(name, 4 * words.len().max(1) as u64, false)?;
        self.write(&buffer, 0, words)?;
        Ok(buffer)
    }
    /// The words of a buffer.
    ///
    /// # Errors
    /// The device fails.
    fn read(&self, buffer: &Self::Buffer) -> Result<Vec<u32>>;
    /// Seconds that each of `count` recordings takes, and how that was measured.
    ///
    /// # Errors
    /// The device fails.
    fn time(
        &self,
        count: usize,
        record: &mut dyn FnMut(&mut Self::Encoder, usize) -> Result<()>,
    ) -> Result<(Vec<f64>, &'static str)>;
    /// Seconds that one of `count` different recordings in a row takes, for each of `rounds` rounds or of all runs in
    /// them.
    ///
    /// # Errors
    /// The device fails.
    fn time_rounds(
        &self,
        count: usize,
        rounds: usize,
        record: &mut dyn FnMut(&mut Self::Encoder, usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let one = &mut |encoder: &mut Self::Encoder, at: usize| record(encoder, at % count.max(1));
        self.time(count * rounds, one).map(|(seconds, _)| seconds)
    }
}

impl Host for Cpu {
    fn encoder(&self) -> CpuEncoder {
        CpuEncoder
    }

    fn submit(&self, _encoder: CpuEncoder) -> Result<()> {
        Ok(())
    }

    fn read(&self, buffer: &CpuBuffer) -> Result<Vec<u32>> {
        Ok(buffer.to_words())
    }

    fn time(
        &self,
        count: usize,
        record: &mut dyn FnMut(&mut CpuEncoder, usize) -> Result<()>,
    ) -> Result<(Vec<f64>, &'static str)> {
        Ok((wall_clock(self, count, record)?, "wall clock"))
    }
}

#[cfg(feature = "cuda")]
impl Host for Cuda {
    fn encoder(&self) -> CudaEncoder {
        Cuda::encoder(self)
    }

    fn submit(&self, encoder: CudaEncoder) -> Result<()> {
        self.wait(&encoder)
    }

    fn read(&self, buffer: &CudaBuffer) -> Result<Vec<u32>> {
        self.read_words(buffer)
    }

    fn time(
        &self,
        count: usize,
        record: &mut dyn FnMut(&mut CudaEncoder, usize) -> Result<()>,
    ) -> Result<(Vec<f64>, &'static str)> {
        Ok((self.seconds(count, record)?, "events of a graph"))
    }

    fn time_rounds(
        &self,
        count: usize,
        rounds: usize,
        record: &mut dyn FnMut(&mut CudaEncoder, usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        self.replayed(count, rounds, record)
    }
}

fn wall_clock<B: Host>(
    host: &B,
    count: usize,
    record: &mut dyn FnMut(&mut B::Encoder, usize) -> Result<()>,
) -> Result<Vec<f64>> {
    (0..count)
        .map(|at| {
            let mut encoder = host.encoder();
            let start = Instant::now();
            record(&mut encoder, at)?;
            host.submit(encoder)?;
            Ok(start.elapsed().as_secs_f64())
        })
        .collect()
}

/// What a layer gives back.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// [T, k].
    pub topk_ids: Vec<i32>,
    /// [T, k].
    pub topk_weights: Vec<f32>,
    /// [T, n], the shares of joint normalisation, else empty.
    pub shared_weights: Vec<f32>,
    /// [T, S], the state of an MLP router for the next layer, else empty.
    pub router_states: Vec<f32>,
    /// [T, H], widened; empty if only the routing was planned.
    pub output: Vec<f32>,
}

/// A plan with buffers of its own.
pub struct Session<B: Host> {
    bound: Bound<B>,
    scratch: Scratch<B>,
    callers: Callers<B>,
    plan: Plan<B>,
    shape: Shape,
}

/// The buffers that a caller gives.
struct Callers<B: Host> {
    hidden_states: B::Buffer,
    token_ids: Option<B::Buffer>,
    expert_hidden_states: Option<B::Buffer>,
    logits: Option<B::Buffer>,
    previous_router_states: Option<B::Buffer>,
    adapter_ids: Option<B::Buffer>,
    counts: Option<B::Buffer>,
    row_weights: Option<B::Buffer>,
    output: Option<B::Buffer>,
}

/// Widths and types of a session's rows.
#[derive(Debug, Clone, Copy)]
struct Shape {
    hidden_size: usize,
    top_k: usize,
    outputs: usize,
    shares: usize,
    state_size: usize,
    input: FloatType,
    output: FloatType,
}

/// A pattern that is NaN as f32, bf16 and f16, and no id: whoever reads it by mistake shows it.
const POISON: u32 = 0x7fff_7fff;

/// Fills a buffer with NaN.
pub(crate) fn poison<B: Host>(host: &B, buffer: &B::Buffer) -> Result<()> {
    let bytes = host.buffer_bytes(buffer);
    let piece = vec![POISON; bytes.min(1 << 20) as usize / 4];
    for offset in (0..bytes).step_by(1 << 20) {
        let words = piece.len().min((bytes - offset) as usize / 4);
        host.write(buffer, offset, &piece[..words])?;
    }
    Ok(())
}

impl<B: Host> Session<B> {
    /// Allocates and binds. Scratch and output are poisoned with NaN.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(plan: Plan<B>, spec: &crate::MoeSpec) -> Result<Self> {
        let host = plan.backend();
        let shape = Shape {
            hidden_size: spec.hidden_size,
            top_k: spec.top_k,
            outputs: spec.router_outputs(),
            shares: spec.joint_shares(),
            state_size: match spec.router {
                Router::Mlp { state_size, rms_norm_eps: _, previous_state: _, format: _ } => state_size,
                Router::Linear { input: _, format: _, bias: _, transform: _ } | Router::Given { transform: _ } => 0,
            },
            input: spec.precision.input,
            output: spec.precision.output,
        };
        let poisoned = |name: &str, bytes: u64| {
            let buffer = host.create_buffer(name, bytes, false)?;
            poison(host, &buffer)?;
            Ok::<_, Error>(buffer)
        };
        let of = |contents| {
            let found = plan.schedule().buffers.iter().find(|buffer| buffer.contents == contents);
            found.map(|buffer| poisoned(&buffer.name, buffer.bytes)).transpose()
        };
        let callers = Callers {
            hidden_states: of(Contents::HiddenStates)?.ok_or_else(|| {
                Error::invalid("schedule", "no hidden_states", "an input buffer", "this is a fault of lower")
            })?,
            token_ids: of(Contents::TokenIds)?,
            expert_hidden_states: of(Contents::ExpertHiddenStates)?,
            logits: of(Contents::GivenLogits)?,
            previous_router_states: of(Contents::PreviousRouterStates)?,
            adapter_ids: of(Contents::AdapterIds)?,
            counts: of(Contents::Counts)?,
            row_weights: of(Contents::RowWeights)?,
            output: of(Contents::Output)?,
        };
        let layout = plan.scratch_layout().buffers;
        let scratch = layout.into_iter().map(|(name, bytes)| Ok((name.clone(), poisoned(&name, bytes)?)));
        let scratch = Scratch::from_buffers(scratch.collect::<Result<_>>()?);
        let io = Io {
            token_ids: callers.token_ids.as_ref(),
            output: callers.output.as_ref(),
            expert_hidden_states: callers.expert_hidden_states.as_ref(),
            logits: callers.logits.as_ref(),
            previous_router_states: callers.previous_router_states.as_ref(),
            adapter_ids: callers.adapter_ids.as_ref(),
            counts: callers.counts.as_ref(),
            topk_weights: callers.row_weights.as_ref(),
            ..Io::of(&callers.hidden_states)
        };
        let bound = plan.bind(&io, &scratch)?;
        Ok(Self { bound, scratch, callers, plan, shape })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan<B> {
        &self.plan
    }

    /// The recorder.
    pub fn bound(&self) -> &Bound<B> {
        &self.bound
    }

    /// The buffers between steps.
    pub fn scratch(&self) -> &Scratch<B> {
        &self.scratch
    }

    /// The output buffer.
    pub fn output(&self) -> Option<&B::Buffer> {
        self.callers.output.as_ref()
    }

    /// Writes inputs; returns the number of tokens.
    ///
    /// # Errors
    /// Inputs that do not fit, or a refusing device.
    pub fn write(&self, inputs: &Inputs<'_>) -> Result<usize> {
        let host = self.plan.backend();
        let tokens = inputs.hidden_states.len() / self.shape.hidden_size;
        if tokens > self.bound.max_tokens() || !inputs.hidden_states.len().is_multiple_of(self.shape.hidden_size) {
            return Err(Error::invalid(
                "hidden_states",
                format!("{} values", inputs.hidden_states.len()),
                format!("whole rows of {} for at most {} tokens", self.shape.hidden_size, self.bound.max_tokens()),
                "plan for more tokens",
            ));
        }
        let Callers {
            hidden_states,
            token_ids,
            expert_hidden_states,
            logits,
            previous_router_states,
            adapter_ids,
            counts,
            row_weights,
            output: _,
        } = &self.callers;
        let Shape { hidden_size, top_k: _, outputs, shares: _, state_size, input, output: _ } = self.shape;
        host.write(hidden_states, 0, &encode(input, inputs.hidden_states))?;
        if let Some(buffer) = token_ids {
            host.write(buffer, 0, rows("token_ids", inputs.token_ids, tokens)?)?;
        }
        if let Some(buffer) = expert_hidden_states {
            let values = rows("expert_hidden_states", inputs.expert_hidden_states, tokens * hidden_size)?;
            host.write(buffer, 0, &encode(input, values))?;
        }
        if let Some(buffer) = logits {
            let values = rows("logits", inputs.logits, tokens * outputs)?;
            host.write(buffer, 0, &encode(FloatType::F32, values))?;
        }
        if let Some(buffer) = previous_router_states {
            let values = rows("router_states", inputs.router_states, tokens * state_size)?;
            host.write(buffer, 0, &encode(FloatType::F32, values))?;
        }
        if let Some(buffer) = adapter_ids {
            host.write(buffer, 0, bytemuck::cast_slice(rows("adapter_ids", inputs.adapter_ids, tokens)?))?;
        }
        if let Some(buffer) = counts {
            let slots = host.buffer_bytes(buffer) as usize / 4;
            host.write(buffer, 0, rows("counts", inputs.counts, slots)?)?;
        }
        if let Some(buffer) = row_weights {
            let values = rows("row_weights", inputs.row_weights, tokens)?;
            host.write(buffer, 0, &encode(FloatType::F32, values))?;
        }
        Ok(tokens)
    }

    /// Runs a layer on these inputs.
    ///
    /// # Errors
    /// As [`Session::write`], or a failing device.
    pub fn run(&self, inputs: &Inputs<'_>) -> Result<Outcome> {
        let tokens = self.write(inputs)?;
        let host = self.plan.backend();
        let mut encoder = host.encoder();
        self.bound.record(&mut encoder, &Tokens::Host(tokens))?;
        host.submit(encoder)?;
        self.outcome(tokens)
    }

    /// Reads ids, weights and output of the first `tokens` tokens.
    ///
    /// # Errors
    /// A failing device.
    pub fn outcome(&self, tokens: usize) -> Result<Outcome> {
        let host = self.plan.backend();
        let Shape { hidden_size, top_k, outputs: _, shares, state_size, input: _, output } = self.shape;
        let words = |name: &str, width: usize| match self.scratch.buffer(name) {
            Some(buffer) => Ok(host.read(buffer)?.into_iter().take(tokens * width).collect::<Vec<u32>>()),
            None => Ok::<_, Error>(vec![]),
        };
        Ok(Outcome {
            topk_ids: bytemuck::cast_vec(words("topk_ids", top_k)?),
            topk_weights: bytemuck::cast_vec(words("topk_weights", top_k)?),
            shared_weights: bytemuck::cast_vec(words("shared_weights", shares)?),
            router_states: bytemuck::cast_vec(words("router_states", state_size)?),
            output: match &self.callers.output {
                None => vec![],
                Some(buffer) => decode(output, &host.read(buffer)?, tokens * hidden_size),
            },
        })
    }

    /// Seconds of each step for `tokens` tokens: the median of `runs`, and how it was measured.
    ///
    /// # Errors
    /// A failing device.
    pub fn time_steps(&self, tokens: usize, runs: usize) -> Result<(Vec<f64>, &'static str)> {
        let host = self.plan.backend();
        let steps = self.bound.steps(tokens).len();
        let mut all = vec![];
        let mut method = "";
        for _ in 0..runs.max(1) {
            let record = &mut |encoder: &mut B::Encoder, wanted: usize| {
                self.bound.record_steps(encoder, &Tokens::Host(tokens), &|at, _| at == wanted)
            };
            let (seconds, how) = host.time(steps, record)?;
            method = how;
            all.push(seconds);
        }
        let median = |step: usize| {
            let mut times: Vec<f64> = all.iter().map(|run| run[step]).collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        Ok(((0..steps).map(median).collect(), method))
    }
}

/// The values that a layer wants, which must be there and as many as it wants.
fn rows<'a, T>(field: &'static str, values: Option<&'a [T]>, count: usize) -> Result<&'a [T]> {
    match values {
        Some(values) if values.len() == count => Ok(values),
        found => Err(Error::invalid(
            field,
            found.map_or("none".into(), |values| format!("{} values", values.len())),
            format!("{count} values"),
            "the layer reads them: give a row for each token",
        )),
    }
}

/// Values as words of `float_type`, rounded to nearest even.
pub fn encode(float_type: FloatType, values: &[f32]) -> Vec<u32> {
    let pairs = |bits: &dyn Fn(f32) -> u16| {
        let word = |pair: &[f32]| {
            let high = pair.get(1).map_or(0, |&value| u32::from(bits(value)));
            u32::from(bits(pair[0])) | high << 16
        };
        values.chunks(2).map(word).collect()
    };
    match float_type {
        FloatType::F32 => values.iter().map(|value| value.to_bits()).collect(),
        FloatType::F16 => pairs(&|value| half::f16::from_f32(value).to_bits()),
        FloatType::Bf16 => pairs(&|value| half::bf16::from_f32(value).to_bits()),
    }
}

/// The first `count` values of words of `float_type`.
pub fn decode(float_type: FloatType, words: &[u32], count: usize) -> Vec<f32> {
    let halves = words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]).take(count);
    match float_type {
        FloatType::F32 => words.iter().take(count).map(|&word| f32::from_bits(word)).collect(),
        FloatType::F16 => halves.map(numerics::decode_f16).collect(),
        FloatType::Bf16 => halves.map(numerics::decode_bf16).collect(),
    }
}

#[cfg(feature = "wgpu")]
mod pipelines;
#[cfg(feature = "wgpu")]
pub use gpu::{Adapter, Limits, adapters, open};
#[cfg(feature = "wgpu")]
pub use pipelines::PipelineFile;

#[cfg(feature = "wgpu")]
mod gpu {
    use super::{Host, wall_clock};
    use crate::backend::wgpu::{Wgpu, required_features, required_limits};
    use crate::error::{Error, Result};

    /// An adapter on this machine.
    #[derive(Debug, Clone)]
    pub struct Adapter {
        handle: wgpu::Adapter,
        /// Name, driver and API.
        pub name: String,
        /// Whether it computes on the CPU.
        pub software: bool,
        rank: u8,
    }

    impl Adapter {
        /// What wgpu knows of it.
        pub fn handle(&self) -> &wgpu::Adapter {
            &self.handle
        }

        /// Whether `wanted` is a part of its name, driver or API, whatever the case.
        pub fn matches(&self, wanted: &str) -> bool {
            self.name.to_lowercase().contains(&wanted.to_lowercase())
        }
    }

    /// All adapters, best first: discrete, integrated, virtual, unknown, software.
    pub fn adapters() -> Vec<Adapter> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            // Validation layers are for our tests of wgpu, not for a user's machine.
            flags: wgpu::InstanceFlags::empty(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let found = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
        let mut adapters: Vec<Adapter> = found
            .into_iter()
            .map(|handle| {
                let info = handle.get_info();
                let rank = match info.device_type {
                    wgpu::DeviceType::DiscreteGpu => 0,
                    wgpu::DeviceType::IntegratedGpu => 1,
                    wgpu::DeviceType::VirtualGpu => 2,
                    wgpu::DeviceType::Other => 3,
                    wgpu::DeviceType::Cpu => 4,
                };
                let name = format!("{} ({} {}, {})", info.name, info.driver, info.driver_info, info.backend);
                Adapter { handle, name, software: rank == 4, rank }
            })
            .collect();
        adapters.sort_by_key(|adapter| adapter.rank);
        adapters
    }

    /// What to ask of an adapter.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Limits {
        /// `wgpu::Limits::default()` and no features: the portability floor.
        Default,
        /// Its own limits, and timestamps and a pipeline cache where it has them.
        Adapter,
    }

    /// A device of our own on an adapter.
    ///
    /// # Errors
    /// The adapter refuses.
    pub fn open(adapter: &Adapter, limits: Limits) -> Result<Wgpu> {
        let wanted = wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
            | wgpu::Features::PIPELINE_CACHE;
        let (features, limits) = match limits {
            Limits::Default => (required_features(), required_limits()),
            Limits::Adapter => (adapter.handle.features() & wanted, adapter.handle.limits()),
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("moewe"),
            required_features: features,
            required_limits: limits,
            ..wgpu::DeviceDescriptor::default()
        };
        let opened = pollster::block_on(adapter.handle.request_device(&descriptor));
        let (device, queue) = opened.map_err(|error| failed(format!("opening {}", adapter.name), &error))?;
        Ok(Wgpu::new(device, queue))
    }

    fn failed(operation: String, reason: &dyn std::fmt::Display) -> Error {
        Error::Device { backend: "wgpu", operation, reason: reason.to_string() }
    }

    fn wait(device: &wgpu::Device) -> Result<()> {
        let polled = device.poll(wgpu::PollType::wait_indefinitely());
        polled.map(|_| ()).map_err(|error| failed("waiting for the device".into(), &error))
    }

    /// Submits `encoder` with a copy of `buffer` behind its work, waits, and reads the copy.
    fn read_after(host: &Wgpu, mut encoder: wgpu::CommandEncoder, buffer: &wgpu::Buffer) -> Result<Vec<u32>> {
        let device = host.device();
        let target = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("readback"),
            size: buffer.size(),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        encoder.copy_buffer_to_buffer(buffer, 0, &target, 0, buffer.size());
        host.scoped(&|| "submitting".into(), || host.queue().submit([encoder.finish()]))?;
        target.map_async(wgpu::MapMode::Read, .., |_| {});
        wait(device)?;
        let view = target.get_mapped_range(..).map_err(|error| failed("reading a buffer back".into(), &error))?;
        Ok(bytemuck::pod_collect_to_vec(&view))
    }

    impl Host for Wgpu {
        fn encoder(&self) -> wgpu::CommandEncoder {
            self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("moewe") })
        }

        fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<()> {
            self.scoped(&|| "submitting".into(), || self.queue().submit([encoder.finish()]))?;
            wait(self.device())
        }

        fn read(&self, buffer: &wgpu::Buffer) -> Result<Vec<u32>> {
            read_after(self, self.encoder(), buffer)
        }

        fn time(
            &self,
            count: usize,
            record: &mut dyn FnMut(&mut wgpu::CommandEncoder, usize) -> Result<()>,
        ) -> Result<(Vec<f64>, &'static str)> {
            let device = self.device();
            if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS) {
                return Ok((wall_clock(self, count, record)?, "wall clock, submission and wait included"));
            }
            // A query set has room for 4,096.
            if count > 4095 {
                let (mut first, method) = self.time(4095, record)?;
                let (rest, _) = self.time(count - 4095, &mut |encoder, at| record(encoder, at + 4095))?;
                first.extend(rest);
                return Ok((first, method));
            }
            let stamps = count as u32 + 1;
            let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("steps"),
                ty: wgpu::QueryType::Timestamp,
                count: stamps,
            });
            let resolved = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: 8 * u64::from(stamps),
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            let mut encoder = self.encoder();
            encoder.write_timestamp(&queries, 0);
            for at in 0..count {
                record(&mut encoder, at)?;
                encoder.write_timestamp(&queries, at as u32 + 1);
            }
            encoder.resolve_query_set(&queries, 0..stamps, &resolved, 0);
            let words = read_after(self, encoder, &resolved)?;
            let ticks: Vec<u64> =
                words.chunks_exact(2).map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32).collect();
            let period = f64::from(self.queue().get_timestamp_period()) * 1e-9;
            let seconds = ticks.windows(2).map(|pair| pair[1].saturating_sub(pair[0]) as f64 * period);
            Ok((seconds.collect(), "GPU timestamps"))
        }
    }
}
