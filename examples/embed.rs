//! Sixty layers on a device of your own: plan, bind, record them all into your encoder, submit when you like.
//!
//! `cargo run --release --example embed [CHECKPOINT_DIR]`. The layers share one scratch, and the number
//! of tokens is a word in a buffer of yours, which the device could have counted.

use std::path::Path;

use moewe::families::{Request, resolve};
use moewe::reference::{self, Inputs};
use moewe::spec::{ActivationQuant, FloatType};
use moewe::{Backend, Checkpoint, Io, Options, Plan, Scratch, Tokens, Wgpu, wgpu};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Your program has a device already; moewe asks for no feature and WebGPU's default limits.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let descriptor = wgpu::DeviceDescriptor {
        required_features: moewe::backend::wgpu::required_features(),
        required_limits: moewe::backend::wgpu::required_limits(),
        ..wgpu::DeviceDescriptor::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;

    // A checkpoint gives the spec and the weights; the spec says everything the layer does.
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/deepseek_v3");
    let folder = std::env::args().nth(1).unwrap_or_else(|| sample.to_string());
    let checkpoint = Checkpoint::open(Path::new(&folder))?;
    let request =
        Request { layer: None, input: FloatType::F32, output: FloatType::F32, activations: ActivationQuant::None };
    let resolved = resolve(&checkpoint, &request)?;
    let (spec, weights) = (&resolved.spec, resolved.weights(&checkpoint)?);

    // Once per layer: compile and upload. Here all sixty are the same one. What the backend lacks is an error here, never later.
    let max_tokens = 4;
    let backend = Wgpu::new(device.clone(), queue.clone());
    let plan = Plan::new(backend.clone(), spec, &weights, max_tokens, &Options::AUTO)?;
    let scratch = Scratch::new(&backend, &plan.scratch_layout())?;

    // Once per set of buffers: here two, which take turns.
    let bytes = (4 * max_tokens * spec.hidden_size) as u64;
    let buffer = |name| backend.create_buffer(name, bytes, false);
    let (inputs, outputs) = ([buffer("x0")?, buffer("x1")?], [buffer("y0")?, buffer("y1")?]);
    let token_ids = backend.create_buffer("token_ids", 4 * max_tokens as u64, false)?;
    let hashed = plan.schedule().buffers.iter().any(|buffer| buffer.name == "token_ids");
    let io =
        |at: usize| Io { token_ids: hashed.then_some(&token_ids), output: Some(&outputs[at]), ..Io::of(&inputs[at]) };
    let bounds = [plan.bind(&io(0), &scratch)?, plan.bind(&io(1), &scratch)?];

    // Each call: inputs, record, submit. moewe submits nothing and waits for nothing.
    let tokens = 3;
    let rows = |phase: f32| (0..tokens * spec.hidden_size).map(|at| (at as f32 * 0.37 + phase).sin()).collect();
    let x: [Vec<f32>; 2] = [rows(0.0), rows(1.0)];
    for (buffer, x) in inputs.iter().zip(&x) {
        queue.write_buffer(buffer, 0, bytemuck::cast_slice(x));
    }
    let count = backend.create_buffer("count", 4, false)?;
    queue.write_buffer(&count, 0, bytemuck::bytes_of(&(tokens as u32)));
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    for layer in 0..60 {
        bounds[layer % 2].record(&mut encoder, &Tokens::Device(&count, 0))?;
    }
    let readback = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 2 * bytes,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    for (at, output) in outputs.iter().enumerate() {
        encoder.copy_buffer_to_buffer(output, 0, &readback, at as u64 * bytes, bytes);
    }
    queue.submit([encoder.finish()]);
    readback.map_async(wgpu::MapMode::Read, .., |_| {});
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let y: Vec<f32> = bytemuck::pod_collect_to_vec(&readback.get_mapped_range(..)?);

    // The reference judges.
    let ids = vec![0; tokens];
    let mut worst = 0f32;
    for (x, y) in x.iter().zip(y.chunks_exact(max_tokens * spec.hidden_size)) {
        let inputs = Inputs { token_ids: hashed.then_some(&ids), ..Inputs::of(x) };
        let want = reference::layer(spec, &weights, inputs)?.output;
        let errors = want.iter().zip(y).map(|(want, got)| (want - got).abs());
        // NaN is no error that `max` would keep.
        worst = errors.map(|error| if error.is_nan() { f32::INFINITY } else { error }).fold(worst, f32::max);
    }
    println!("{} on {}: 60 layers, largest error {worst:.1e}", resolved.family, adapter.get_info().name);
    if worst > 1e-3 {
        return Err(format!("the device is wrong by {worst}").into());
    }
    Ok(())
}
