//! Devices that fail: lost before, between and after the calls, out of memory, misused. Errors, never a panic.

use moewe::host::{self, Host, Limits, Session};
use moewe::{Backend, Error, Io, Plan, Scratch, Tokens, Wgpu};

use crate::rig::{AUTO, RandomLayer, deepseek_like};

/// A device of its own, which the test may destroy.
fn device() -> Wgpu {
    let wanted = std::env::var("MOEWE_ADAPTER").unwrap_or_default();
    let adapter = host::adapters().into_iter().find(|adapter| adapter.matches(&wanted)).unwrap();
    host::open(&adapter, Limits::Default).unwrap()
}

fn lost<T>(result: moewe::Result<T>, when: &str) {
    match result.err() {
        Some(Error::DeviceLost { backend: "wgpu", operation }) => assert!(!operation.is_empty(), "{when}"),
        other => panic!("{when}: {other:?}"),
    }
}

#[test]
fn a_lost_device_is_an_error_of_the_next_call_and_a_new_one_gives_the_same_bits() {
    let layer = RandomLayer::new(deepseek_like(), 17);
    let inputs = layer.all_inputs(9, 3);
    let run = |backend: Wgpu| {
        let plan = Plan::new(backend, &layer.spec, &layer.weights(), 9, &AUTO).unwrap();
        Session::new(plan, &layer.spec).unwrap().run(&inputs.view()).unwrap().output
    };
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let want = bits(run(device()));

    // Before a plan.
    let backend = device();
    backend.device().destroy();
    lost(Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO), "planning");
    lost(backend.create_buffer("x", 64, false), "creating a buffer");

    // Between plan, bind, record and submit.
    for at in 0..4 {
        let backend = device();
        let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO).unwrap();
        let scratch = Scratch::new(&backend, &plan.scratch_layout()).unwrap();
        let x = backend.create_buffer("x", 9 * 40 * 2, false).unwrap();
        let y = backend.create_buffer("y", 9 * 40 * 4, false).unwrap();
        let io = Io { output: Some(&y), ..Io::of(&x) };
        if at == 0 {
            backend.device().destroy();
            lost(plan.bind(&io, &scratch), "binding");
            continue;
        }
        let bound = plan.bind(&io, &scratch).unwrap();
        let mut encoder = backend.encoder();
        if at == 1 {
            backend.device().destroy();
            lost(bound.record(&mut encoder, &Tokens::Host(9)), "recording");
            continue;
        }
        bound.record(&mut encoder, &Tokens::Host(9)).unwrap();
        if at == 2 {
            backend.device().destroy();
            lost(backend.submit(encoder), "submitting");
        } else {
            backend.submit(encoder).unwrap();
            backend.device().destroy();
        }
        lost(bound.record(&mut backend.encoder(), &Tokens::Host(9)), "recording again");
        lost(backend.write(&x, 0, &[0; 4]), "writing");
    }
    assert_eq!(bits(run(device())), want);
}

#[test]
fn a_buffer_beyond_the_limit_is_an_error() {
    let backend = device();
    let said = backend.create_buffer("huge", 1 << 40, false).unwrap_err().to_string();
    assert!(said.contains("huge") && said.contains(&(1u64 << 40).to_string()), "{said}");
    // The device lives on.
    backend.create_buffer("small", 64, false).unwrap();
    match moewe::Cpu::new().create_buffer("huge", 1 << 60, false).err() {
        Some(Error::OutOfMemory { backend: "cpu", .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_buffer_without_storage_usage_is_an_error_of_bind() {
    let layer = RandomLayer::new(deepseek_like(), 17);
    let backend = device();
    let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO).unwrap();
    let scratch = Scratch::new(&backend, &plan.scratch_layout()).unwrap();
    let x = backend.device().create_buffer(&moewe::wgpu::BufferDescriptor {
        label: Some("x"),
        size: 9 * 40 * 2,
        usage: moewe::wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let y = backend.create_buffer("y", 9 * 40 * 4, false).unwrap();
    match plan.bind(&Io { output: Some(&y), ..Io::of(&x) }, &scratch).err() {
        Some(Error::Device { operation, reason, .. }) => {
            assert!(operation.contains("storage usage") && reason.contains("STORAGE"), "{operation}: {reason}");
        }
        other => panic!("{other:?}"),
    }
}
