//! Each step of a layer alone, for few and for many tokens, on the CPU backend and on the adapter
//! (MOEWE_ADAPTER). The layer is checked against the reference before its steps are timed.

#[allow(dead_code, reason = "the rig serves the test suite first")]
#[path = "../tests/suite/rig.rs"]
mod rig;
mod roofline;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moewe::host::{Host, Session};
use moewe::reference::Inputs;
use moewe::{Cpu, Plan, Tokens};

use rig::{AUTO, RandomLayer, wgpu};
use roofline::{Device, bench_spec};

fn steps<B: Host + Clone>(criterion: &mut Criterion, backend: &B, device: &Device) {
    let layer = RandomLayer::new(bench_spec(), 1);
    for tokens in [1, 64] {
        let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), tokens, &AUTO).unwrap();
        let session = Session::new(plan, &layer.spec).unwrap();
        let (hidden_states, _) = layer.inputs(tokens, 2);
        let inputs = Inputs::of(&hidden_states);
        let got = session.run(&inputs).unwrap();
        let checked = roofline::check(&layer, &hidden_states, &got.output);
        device.report("small_fp8", &layer.spec, &got.topk_ids, tokens, checked);
        for (at, step) in session.bound().steps(tokens).iter().enumerate() {
            let mut group = criterion.benchmark_group(format!("{}/{}", step.name, device.name));
            group.bench_function(BenchmarkId::new(step.operation.source().kernel(), tokens), |bencher| {
                bencher.iter_custom(|runs| {
                    let record = &mut |encoder: &mut B::Encoder, _| {
                        session.bound().record_steps(encoder, &Tokens::Host(tokens), &|index, _| index == at)
                    };
                    let (seconds, _) = backend.time(runs.min(500) as usize, record).unwrap();
                    std::time::Duration::from_secs_f64(seconds.iter().sum::<f64>() * runs as f64 / seconds.len() as f64)
                });
            });
        }
    }
}

fn all(criterion: &mut Criterion) {
    let cpu = Cpu::new();
    steps(criterion, &cpu, &Device::cpu());
    steps(criterion, wgpu(), &Device::gpu(wgpu()));
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(10);
    targets = all
}
criterion_main!(kernels);
