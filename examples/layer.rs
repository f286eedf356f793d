//! One layer on a device of your own: plan, bind, record into your encoder, submit when you like.
//!
//! `cargo run --release --example layer [CHECKPOINT_DIR]`

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

    // Once per layer: compile and upload. What the backend lacks is an error here, never later.
    let max_tokens = 4;
    let backend = Wgpu::new(device.clone(), queue.clone());
    let options = Options {
        segment_bytes: None,
        decode_tokens: moewe::schedule::DECODE_TOKENS,
        fuse_quantization: true,
        diagnostics: false,
    };
    let plan = Plan::new(backend.clone(), spec, &weights, max_tokens, &options)?;
    let scratch = Scratch::new(&backend, &plan.scratch_layout())?;

    // Once per set of buffers.
    let bytes = (4 * max_tokens * spec.hidden_size) as u64;
    let hidden_states = backend.create_buffer("hidden_states", bytes, false)?;
    let token_ids = backend.create_buffer("token_ids", 4 * max_tokens as u64, false)?;
    let output = backend.create_buffer("output", bytes, false)?;
    let hashed = plan.schedule().buffers.iter().any(|buffer| buffer.name == "token_ids");
    let io = Io { token_ids: hashed.then_some(&token_ids), output: Some(&output), ..Io::of(&hidden_states) };
    let bound = plan.bind(&io, &scratch)?;

    // Each call: inputs, record, submit. moewe submits nothing and waits for nothing.
    let tokens = 3;
    let x: Vec<f32> = (0..tokens * spec.hidden_size).map(|at| (at as f32 * 0.37).sin()).collect();
    queue.write_buffer(&hidden_states, 0, bytemuck::cast_slice(&x));
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    bound.record(&mut encoder, &Tokens::Host(tokens))?;
    let readback = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    encoder.copy_buffer_to_buffer(&output, 0, &readback, 0, bytes);
    queue.submit([encoder.finish()]);
    readback.map_async(wgpu::MapMode::Read, .., |_| {});
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let y: Vec<f32> = bytemuck::pod_collect_to_vec(&readback.get_mapped_range(..)?);

    // The reference judges.
    let ids = vec![0; tokens];
    let inputs = Inputs { token_ids: hashed.then_some(&ids), ..Inputs::of(&x) };
    let want = reference::layer(spec, &weights, inputs)?.output;
    let worst = want.iter().zip(&y).map(|(want, got)| (want - got).abs()).fold(0f32, f32::max);
    println!("{} on {}: {tokens} tokens, largest error {worst:.1e}", resolved.family, adapter.get_info().name);
    if worst.is_nan() || worst > 1e-3 {
        return Err(format!("the device is wrong by {worst}").into());
    }
    Ok(())
}
