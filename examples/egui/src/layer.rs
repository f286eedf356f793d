//! The layer beside a UI: on its device, in its queue, and never waited for.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use eframe::egui_wgpu::{RenderState, WgpuSetup};
use eframe::wgpu;
use moewe::families::{Request, Resolved, resolve};
use moewe::spec::{Activation, ActivationQuant, FloatType, MoeSpec, RoutingMethod, SelectionKey};
use moewe::{Backend, Bound, Checkpoint, Io, Options, Plan, Scratch, Tokens, Wgpu};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

pub const MAX_TOKENS: usize = 64;
/// The golden layer of DeepSeek-V4: it has a clamp limit, a routed factor and a selection bias to lose.
const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/deepseek_v4_topk");
const TIMESTAMPS: wgpu::Features =
    wgpu::Features::TIMESTAMP_QUERY.union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

/// The device that both use: what egui asks for, what moewe asks for, and a clock where there is one.
pub fn device_setup() -> WgpuSetup {
    let mut setup = WgpuSetup::without_display_handle();
    if let WgpuSetup::CreateNew(new) = &mut setup {
        let egui = Arc::clone(&new.device_descriptor);
        new.device_descriptor = Arc::new(move |adapter| {
            let mut descriptor = egui(adapter);
            let moewe = moewe::backend::wgpu::required_features();
            descriptor.required_features |= moewe | (adapter.features() & TIMESTAMPS);
            let limits = std::mem::take(&mut descriptor.required_limits);
            descriptor.required_limits = limits.or_better_values_from(&moewe::backend::wgpu::required_limits());
            descriptor
        });
    }
    setup
}

/// Parameters that can be dropped.
#[derive(Clone, Copy, PartialEq)]
pub struct Kept {
    pub limit: bool,
    pub factor: bool,
    pub bias: bool,
}

impl Kept {
    pub const ALL: Self = Self { limit: true, factor: true, bias: true };

    /// What an engine computes that loses the others.
    fn of(self, spec: &MoeSpec) -> MoeSpec {
        let mut spec = spec.clone();
        let shared = spec.shared.as_mut().map(|shared| &mut shared.mlp);
        for mlp in shared.into_iter().chain([&mut spec.experts]) {
            if let (false, Activation::Swiglu { limit }) = (self.limit, &mut mlp.activation) {
                *limit = None;
            }
        }
        if !self.factor {
            spec.routing.routed_scaling_factor = 1.0;
        }
        if let (false, RoutingMethod::TopK { key, score: _, groups: _ }) = (self.bias, &mut spec.routing.method) {
            *key = SelectionKey::Score;
        }
        spec
    }
}

/// A layer, planned and bound to the common input and an output of its own.
struct Layer {
    bound: Bound<Wgpu>,
    scratch: Scratch<Wgpu>,
    output: wgpu::Buffer,
}

/// The layer as its checkpoint says, and once more without what is dropped.
pub struct Layers {
    backend: Wgpu,
    checkpoint: Checkpoint,
    pub resolved: Resolved,
    input: wgpu::Buffer,
    whole: Layer,
    changed: Layer,
    queries: Option<(wgpu::QuerySet, wgpu::Buffer)>,
    /// Results on their way back: whether they are there, and of how many tokens.
    readback: Option<(wgpu::Buffer, Arc<AtomicBool>, usize)>,
}

/// Results that have come back.
#[derive(Default)]
pub struct Seen {
    pub tokens: usize,
    /// [T, k].
    pub ids: Vec<i32>,
    /// [T, k].
    pub weights: Vec<f32>,
    /// `[T]`: how far the changed layer's output is from the right one, relative.
    pub off: Vec<f32>,
    /// On the GPU's clock.
    pub layer_ms: Option<f32>,
}

impl Layers {
    /// Takes clones of the window's own handles: there is no second device.
    pub fn new(window: &RenderState) -> Result<Self> {
        let (device, backend) = (&window.device, Wgpu::new(window.device.clone(), window.queue.clone()));
        let checkpoint = Checkpoint::open(Path::new(CHECKPOINT))?;
        let float = FloatType::F32;
        let request = Request { layer: None, input: float, output: float, activations: ActivationQuant::None };
        let resolved = resolve(&checkpoint, &request)?;
        let bytes = (4 * MAX_TOKENS * resolved.spec.hidden_size) as u64;
        let input = backend.create_buffer("hidden_states", bytes, false)?;
        let layer = || plan(&backend, &checkpoint, &resolved, Kept::ALL, &input);
        let (whole, changed) = (layer()?, layer()?);
        let queries = device.features().contains(TIMESTAMPS).then(|| {
            let set = wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count: 2 };
            let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
            let words = wgpu::BufferDescriptor { label: None, size: 16, usage, mapped_at_creation: false };
            (device.create_query_set(&set), device.create_buffer(&words))
        });
        Ok(Self { whole, changed, backend, checkpoint, resolved, input, queries, readback: None })
    }

    /// Plans the second layer anew. Kernels that are known already are not compiled again.
    pub fn change(&mut self, kept: Kept) -> Result<()> {
        self.changed = plan(&self.backend, &self.checkpoint, &self.resolved, kept, &self.input)?;
        Ok(())
    }

    /// Records both into an encoder and submits it; egui's commands follow in the same queue.
    pub fn run(&mut self, rows: &[f32]) -> Result<()> {
        let (device, queue) = (self.backend.device(), self.backend.queue());
        let tokens = rows.len() / self.resolved.spec.hidden_size;
        queue.write_buffer(&self.input, 0, bytemuck::cast_slice(rows));
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let stamp = |encoder: &mut wgpu::CommandEncoder, at| {
            self.queries.iter().for_each(|(queries, _)| encoder.write_timestamp(queries, at));
        };
        stamp(&mut encoder, 0);
        self.whole.bound.record(&mut encoder, &Tokens::Host(tokens))?;
        stamp(&mut encoder, 1);
        self.changed.bound.record(&mut encoder, &Tokens::Host(tokens))?;
        if self.readback.is_some() {
            // The results before are still on their way: nobody looks at these.
            queue.submit([encoder.finish()]);
            return Ok(());
        }
        let of = |name| self.whole.scratch.buffer(name).ok_or("a scratch has ids and weights");
        let mut parts = vec![&self.whole.output, &self.changed.output, of("topk_ids")?, of("topk_weights")?];
        if let Some((queries, words)) = &self.queries {
            encoder.resolve_query_set(queries, 0..2, words, 0);
            parts.push(words);
        }
        let size = parts.iter().map(|part| part.size()).sum();
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some("readback"), size, usage, mapped_at_creation: false };
        let (buffer, mut at) = (device.create_buffer(&descriptor), 0);
        for part in parts {
            encoder.copy_buffer_to_buffer(part, 0, &buffer, at, part.size());
            at += part.size();
        }
        queue.submit([encoder.finish()]);
        let there = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&there);
        buffer.map_async(wgpu::MapMode::Read, .., move |result| told.store(result.is_ok(), Ordering::Release));
        self.readback = Some((buffer, there, tokens));
        Ok(())
    }

    /// Results, if some have come back.
    pub fn collect(&mut self) -> Result<Option<Seen>> {
        self.backend.device().poll(wgpu::PollType::Poll)?;
        let back = self.readback.take_if(|(_, there, _)| there.load(Ordering::Acquire));
        let Some((buffer, _, tokens)) = back else { return Ok(None) };
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&buffer.get_mapped_range(..)?);
        let (hidden_size, top_k) = (self.resolved.spec.hidden_size, self.resolved.spec.top_k);
        let (right, rest) = words.split_at(MAX_TOKENS * hidden_size);
        let (changed, rest) = rest.split_at(MAX_TOKENS * hidden_size);
        let (ids, rest) = rest.split_at(MAX_TOKENS * top_k);
        let (weights, times) = rest.split_at(MAX_TOKENS * top_k);
        let floats = |words: &[u32]| words.iter().map(|&word| f32::from_bits(word)).collect::<Vec<_>>();
        let off = |(right, changed): (&[u32], &[u32])| {
            let (right, changed) = (floats(right), floats(changed));
            let square: f32 = right.iter().zip(changed).map(|(a, b)| (a - b) * (a - b)).sum();
            (square / right.iter().map(|a| a * a).sum::<f32>()).sqrt()
        };
        let period = self.backend.queue().get_timestamp_period();
        let ticks: Vec<u64> = times.chunks_exact(2).map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32).collect();
        Ok(Some(Seen {
            tokens,
            ids: ids[..tokens * top_k].iter().map(|&id| id as i32).collect(),
            weights: floats(&weights[..tokens * top_k]),
            off: right.chunks(hidden_size).zip(changed.chunks(hidden_size)).take(tokens).map(off).collect(),
            layer_ms: ticks.windows(2).map(|pair| 1e-6 * pair[1].saturating_sub(pair[0]) as f32 * period).next(),
        }))
    }
}

fn plan(
    backend: &Wgpu,
    checkpoint: &Checkpoint,
    resolved: &Resolved,
    kept: Kept,
    input: &wgpu::Buffer,
) -> Result<Layer> {
    let (spec, mut weights) = (kept.of(&resolved.spec), resolved.weights(checkpoint)?);
    if !kept.bias {
        weights.router.selection_bias = None;
    }
    let plan = Plan::new(backend.clone(), &spec, &weights, MAX_TOKENS, &Options::AUTO)?;
    let scratch = Scratch::new(backend, &plan.scratch_layout())?;
    let output = backend.create_buffer("output", (4 * MAX_TOKENS * spec.hidden_size) as u64, false)?;
    let bound = plan.bind(&Io { output: Some(&output), ..Io::of(input) }, &scratch)?;
    Ok(Layer { bound, scratch, output })
}
