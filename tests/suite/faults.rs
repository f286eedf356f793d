//! Devices that fail: lost before, between and after the calls, out of memory, misused. Errors, never a panic.

use moewe::families::resolve;
use moewe::host::{self, Host, Limits, Session};
use moewe::spec::BlockScale;
use moewe::{Backend, Checkpoint, Cpu, Error, Io, Plan, Scratch, Tokens, Wgpu};

use crate::rig::{AUTO, RandomLayer, deepseek_like};
use crate::samples::{ANY, Sample, open};

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
        lost(backend.read(&y), "reading");
        lost(backend.time(2, &mut |_, _| Ok(())), "timing");
    }
    assert_eq!(bits(run(device())), want);
}

/// A caller's buffers, of which the device is lost while commands wait in two encoders.
#[test]
fn commands_that_were_recorded_before_the_loss_are_refused_and_nothing_waits() {
    let layer = RandomLayer::new(deepseek_like(), 17);
    let (said, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let backend = device();
        let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO).unwrap();
        let session = Session::new(plan, &layer.spec).unwrap();
        let inputs = layer.all_inputs(9, 3);
        session.run(&inputs.view()).unwrap();
        let encoders = [(), ()].map(|()| {
            let mut encoder = backend.encoder();
            session.bound().record(&mut encoder, &Tokens::Host(9)).unwrap();
            encoder
        });
        let [first, second] = encoders;
        backend.submit(first).unwrap();
        backend.device().destroy();
        lost(backend.submit(second), "the second submission");
        lost(session.run(&inputs.view()), "running");
        lost(session.outcome(9), "reading what the first left");
        lost(session.time_steps(9, 3), "timing");
        said.send(()).unwrap();
    });
    hear.recv_timeout(std::time::Duration::from_secs(300)).expect("it hangs, or has failed above");
}

/// What the documentation of `src/error.rs` shows as the message of each variant.
fn documented() -> Vec<(String, String)> {
    let mut found = vec![];
    let (mut example, mut inside) = (String::new(), false);
    for line in include_str!("../../src/error.rs").lines().map(str::trim) {
        let text = line.strip_prefix("/// ").or(line.strip_prefix("///"));
        match text {
            Some("```text") => inside = true,
            Some("```") => inside = false,
            Some(text) if inside => example += &format!("{}{text}", if example.is_empty() { "" } else { " " }),
            Some(_) => {}
            None if line.starts_with('#') => {}
            // A variant, or the struct of that name.
            None => {
                let name = line.trim_start_matches("pub struct ");
                let name = name.split([' ', '(', '{']).next().unwrap_or_default();
                if !example.is_empty() {
                    found.push((name.to_owned(), std::mem::take(&mut example)));
                }
            }
        }
    }
    found
}

#[test]
fn each_variant_of_the_errors_is_documented_with_a_message_that_it_really_gives() {
    let layer = RandomLayer::new(deepseek_like(), 17);
    let planned = |max_tokens| Plan::new(Cpu::new(), &layer.spec, &layer.weights(), max_tokens, &AUTO).err().unwrap();
    let folded = {
        let mut spec = layer.spec.clone();
        spec.precision.block_scale = BlockScale::Folded;
        moewe::supports(&Cpu::new(), &spec, 9).unwrap_err()
    };
    let opened = |config: &str, bytes: Vec<u8>| open(config, bytes).err().unwrap();
    let missing = {
        let mut sample = Sample::golden("mixtral");
        sample.take("model.layers.2.block_sparse_moe.experts.3.w2.weight");
        resolve_all(&sample)
    };
    let gone = device();
    gone.device().destroy();
    let storage_less = {
        let backend = device();
        let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO).unwrap();
        let scratch = Scratch::new(&backend, &plan.scratch_layout()).unwrap();
        let descriptor = moewe::wgpu::BufferDescriptor {
            label: None,
            size: 9 * 80,
            usage: moewe::wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let x = backend.device().create_buffer(&descriptor);
        let y = backend.create_buffer("y", 9 * 160, false).unwrap();
        plan.bind(&Io { output: Some(&y), ..Io::of(&x) }, &scratch).err().unwrap()
    };
    let real = [
        ("Unsupported", folded),
        ("Invalid", planned(0)),
        ("MissingTensor", missing),
        ("Io", Checkpoint::open(std::path::Path::new("nowhere")).err().unwrap()),
        ("Safetensors", opened("{}", vec![0; 4])),
        ("Json", opened("{", vec![])),
        ("DeviceLost", gone.create_buffer("x", 64, false).unwrap_err()),
        ("OutOfMemory", Cpu::new().create_buffer("huge", 1 << 60, false).unwrap_err()),
        ("Device", storage_less),
    ];
    let documented = documented();
    let names: Vec<&str> = documented.iter().map(|(name, _)| name.as_str()).collect();
    let mut expected: Vec<&str> = vec!["Unsupported"];
    expected.extend(real.iter().map(|(name, _)| *name));
    assert_eq!(names, expected);
    let mut wrong = vec![];
    for (name, text) in &documented {
        let (_, error) = real.iter().find(|(of, _)| of == name).unwrap();
        assert!(format!("{error:?}").starts_with(name.as_str()), "{name} is given as {error:?}");
        let message = error.to_string();
        let same = text.strip_suffix("...").map_or(message == *text, |begin| message.starts_with(begin.trim_end()));
        wrong.extend((!same).then(|| format!("{name}:\n  {message}\nis documented as\n  {text}\n")));
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

/// Why a checkpoint's layer cannot be read.
fn resolve_all(sample: &Sample) -> Error {
    let checkpoint = sample.open();
    let resolved = resolve(&checkpoint, &ANY);
    resolved.and_then(|resolved| resolved.weights(&checkpoint).map(|_| ())).unwrap_err()
}

#[test]
fn a_refused_call_leaves_the_device_as_it_was() {
    let layer = RandomLayer::new(deepseek_like(), 17);
    let inputs = layer.all_inputs(9, 3);
    let bits = |backend: &Wgpu| {
        let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO).unwrap();
        let output = Session::new(plan, &layer.spec).unwrap().run(&inputs.view()).unwrap().output;
        output.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let backend = device();
    let want = bits(&backend);
    // A validation error, and a call beyond the plan.
    backend.create_buffer("huge", 1 << 40, false).unwrap_err();
    Plan::new(backend.clone(), &layer.spec, &layer.weights(), 0, &AUTO).err().unwrap();
    assert_eq!(bits(&backend), want);
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
