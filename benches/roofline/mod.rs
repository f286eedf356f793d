//! The benches' layer, its check, and the floor of its time on a device.

use std::collections::BTreeSet;
use std::time::Instant;

use moewe::Wgpu;
use moewe::host::Host;
use moewe::spec::*;

use crate::rig::{RandomLayer, deepseek_like};

/// A DeepSeek-V3 layer at a sixteenth of its widths and an eighth of its experts, FP8 in 128 x 128 blocks.
pub fn bench_spec() -> MoeSpec {
    let mut spec = deepseek_like();
    spec.hidden_size = 448;
    spec.num_experts = 32;
    spec.top_k = 8;
    spec.experts.intermediate_size = 256;
    spec.experts.format = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };
    spec.experts.activation = Activation::Swiglu { limit: None };
    let shared = spec.shared.take().map(|shared| SharedExperts { mlp: spec.experts.clone(), ..shared });
    MoeSpec { shared, ..spec }
}

/// calc_diff of the output against the reference; panics if it is wrong: nothing wrong is timed.
pub fn check(layer: &RandomLayer, hidden_states: &[f32], got: &[f32]) -> f64 {
    let want = layer.reference(hidden_states, None).output;
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        want.iter().zip(got).map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum()
    };
    let difference = 1.0 - 2.0 * sum(&|a, b| a * b) / sum(&|a, b| a * a + b * b);
    // A code beside the middle of two may go either way.
    let allowed = if layer.spec.experts.activation_quant.is_on() { 1e-3 } else { 1e-5 };
    assert!(difference < allowed, "calc_diff {difference}");
    difference
}

/// A device and its measured bandwidth.
pub struct Device {
    /// Backend and adapter.
    pub name: String,
    /// Bytes a second, reading and writing.
    bandwidth: f64,
}

const COPY_BYTES: u64 = 64 << 20;

impl Device {
    /// The CPU, by a copy of 64 MiB.
    pub fn cpu() -> Self {
        let from = vec![1u64; COPY_BYTES as usize / 8];
        let mut to = vec![0u64; from.len()];
        let mut best = f64::MAX;
        for _ in 0..5 {
            let start = Instant::now();
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&to);
            best = best.min(start.elapsed().as_secs_f64());
        }
        Self { name: "cpu".into(), bandwidth: 2.0 * COPY_BYTES as f64 / best }
    }

    /// A GPU, by a copy of 64 MiB on it.
    pub fn gpu(gpu: &Wgpu) -> Self {
        use moewe::Backend;
        let [from, to] = [0, 1].map(|_| gpu.create_buffer("copy", COPY_BYTES, false).unwrap());
        let record = &mut |encoder: &mut moewe::wgpu::CommandEncoder, _| {
            encoder.copy_buffer_to_buffer(&from, 0, &to, 0, COPY_BYTES);
            Ok(())
        };
        let (seconds, _) = gpu.time(5, record).unwrap();
        let best = seconds.into_iter().fold(f64::MAX, f64::min);
        let info = gpu.device().adapter_info();
        let name = format!("wgpu {} {}", info.name, info.driver).replace('/', "-");
        Self { name, bandwidth: 2.0 * COPY_BYTES as f64 / best }
    }

    /// Prints what a time has to be measured against; returns the floor in seconds.
    pub fn report(&self, case: &str, spec: &MoeSpec, topk_ids: &[i32], tokens: usize, checked: f64) -> f64 {
        let distinct = topk_ids.iter().collect::<BTreeSet<_>>().len() + usize::from(spec.shared.is_some());
        let weights = 3 * spec.hidden_size * spec.experts.intermediate_size;
        let bytes = distinct * weights;
        let flops = 2 * (topk_ids.len() + tokens * usize::from(spec.shared.is_some())) * weights;
        let floor = bytes as f64 / self.bandwidth;
        println!(
            "{case} on {}: {tokens} tokens, {bytes} weight bytes, {flops} flops, floor {:.1} us at {:.1} GB/s copied in this run; \
             calc_diff {checked:.1e}",
            self.name,
            1e6 * floor,
            1e-9 * self.bandwidth
        );
        floor
    }
}
