//! Which backend and adapter run, and why no other.

use clap::ValueEnum;
#[cfg(feature = "cuda")]
use moewe::Cuda;
use moewe::{Cpu, Error, Result, Unsupported};

use crate::engine::{Device, Engine, Faults};
#[cfg(feature = "wgpu")]
use crate::pipelines::Pipelines;
use crate::reference_engine::Reference;

/// Value of `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// A hardware adapter through wgpu, else cpu.
    Auto,
    /// The plain reference.
    Reference,
    /// The kernels' twins on the CPU.
    Cpu,
    /// WGSL through wgpu, on the best adapter.
    Wgpu,
    /// CUDA.
    Cuda,
}

/// How the tool drives a device, other than at its best: to show that less is enough, or to search for a fault. Changes
/// no result.
#[derive(Debug, Clone, Copy)]
pub struct Constraints {
    /// Ask an adapter for WebGPU's default limits and no features.
    pub portable: bool,
    /// Bound on one weight buffer.
    pub segment_bytes: Option<u64>,
    /// Keep wgpu's run-time checks in every kernel.
    pub checked: bool,
    /// Keep compiled pipelines in a file for the next run.
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code, reason = "only adapters compile any"))]
    pub keep_pipelines: bool,
}

impl Constraints {
    /// None.
    pub const NONE: Self = Self { portable: false, segment_bytes: None, checked: false, keep_pipelines: false };
}

/// What runs.
pub struct Choice {
    /// Name of the backend.
    pub backend: &'static str,
    /// Name and driver of the adapter, where there is one.
    pub adapter: Option<String>,
    /// The other adapters, best first.
    pub passed_over: Vec<PassedOver>,
    /// What to know beside.
    pub warnings: Vec<String>,
    /// The engine, or why there is none.
    pub engine: Result<Box<dyn Engine>>,
    /// What is kept for the next run, at this choice's end.
    pub pipelines: Option<Pipelines>,
}

/// An adapter that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// Its name.
    pub adapter: String,
    /// Why.
    pub reason: String,
}

impl Choice {
    fn of(backend: &'static str, engine: Result<Box<dyn Engine>>) -> Self {
        Self { backend, adapter: None, passed_over: vec![], warnings: vec![], engine, pipelines: None }
    }

    fn absent(backend: &'static str, field: &'static str, value: &str, because: String) -> Self {
        Self::of(backend, Err(unsupported(backend, field, value, because)))
    }
}

fn unsupported(backend: &'static str, field: &'static str, value: &str, because: String) -> Error {
    let (field, value) = (field.into(), format!("{value:?}"));
    Error::Unsupported(Unsupported { backend: backend.into(), field, value, because: because.into() })
}

/// Chooses and opens. `--adapter` with `auto` means wgpu: who names an adapter wants that one.
pub fn choose(backend: BackendName, adapter: Option<&str>, constraints: Constraints) -> Choice {
    let mut choice = match backend {
        BackendName::Auto if adapter.is_some() => on_wgpu(adapter, constraints),
        BackendName::Auto => automatic(constraints),
        BackendName::Reference => Choice::of("reference", Ok(Box::new(Reference))),
        BackendName::Cpu => on_cpu(vec![], constraints),
        BackendName::Wgpu => on_wgpu(adapter, constraints),
        BackendName::Cuda => on_cuda(adapter, constraints),
    };
    if let (BackendName::Reference | BackendName::Cpu, Some(adapter)) = (backend, adapter) {
        choice.warnings.push(format!("--adapter {adapter} has no effect: backend {} has no adapters", choice.backend));
    }
    if let (BackendName::Reference | BackendName::Cpu | BackendName::Cuda, true) = (backend, constraints.portable) {
        choice.warnings.push(format!("--portable has no effect: backend {} has no adapters", choice.backend));
    }
    if constraints.checked && choice.engine.is_ok() && choice.backend != "wgpu" {
        choice.warnings.push(format!("--checked has no effect: backend {} has no modules of wgpu's", choice.backend));
    }
    choice
}

fn on_cpu(passed_over: Vec<PassedOver>, constraints: Constraints) -> Choice {
    let segment_bytes = constraints.segment_bytes;
    let engine = Device { backend: Cpu::new(), faults: Faults::default(), segment_bytes };
    Choice { passed_over, ..Choice::of("cpu", Ok(Box::new(engine))) }
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(_adapter: Option<&str>, _constraints: Constraints) -> Choice {
    Choice::absent("cuda", "backend", "cuda", "this build has no cuda backend: it is behind the feature cuda".into())
}

/// The first CUDA device whose name or number `--adapter` allows.
#[cfg(feature = "cuda")]
fn on_cuda(adapter: Option<&str>, constraints: Constraints) -> Choice {
    let count = match Cuda::count() {
        Ok(count) => count,
        Err(error) => return Choice::absent("cuda", "backend", "cuda", error.to_string()),
    };
    let mut passed_over = vec![];
    for ordinal in 0..count {
        let device = match Cuda::open(ordinal) {
            Ok(device) => device,
            Err(error) => return Choice { passed_over, ..Choice::of("cuda", Err(error)) },
        };
        let name = format!("{} (cuda device {ordinal})", device.name());
        match adapter {
            Some(part) if !name.to_lowercase().contains(&part.to_lowercase()) => {
                passed_over.push(PassedOver { adapter: name, reason: format!("does not match --adapter {part}") });
            }
            Some(_) | None => {
                let segment_bytes = constraints.segment_bytes;
                let engine = Device { backend: device, faults: Faults::default(), segment_bytes };
                return Choice { adapter: Some(name), passed_over, ..Choice::of("cuda", Ok(Box::new(engine))) };
            }
        }
    }
    let names: Vec<&str> = passed_over.iter().map(|passed| passed.adapter.as_str()).collect();
    let because = match names.as_slice() {
        [] => "this machine has no CUDA device".into(),
        [..] => format!("no device has this in its name or number; there are: {}", names.join("; ")),
    };
    Choice { passed_over, ..Choice::absent("cuda", "adapter", adapter.unwrap_or(""), because) }
}

#[cfg(not(feature = "wgpu"))]
/// There are none.
pub type Pipelines = std::convert::Infallible;

#[cfg(not(feature = "wgpu"))]
const NOT_BUILT: &str = "built without feature wgpu";

#[cfg(not(feature = "wgpu"))]
fn automatic(constraints: Constraints) -> Choice {
    let mut choice = on_cpu(vec![], constraints);
    choice.warnings.push(format!("no adapter was looked for: {NOT_BUILT}"));
    choice
}

#[cfg(not(feature = "wgpu"))]
fn on_wgpu(_adapter: Option<&str>, _constraints: Constraints) -> Choice {
    Choice::absent("wgpu", "backend", "wgpu", NOT_BUILT.into())
}

#[cfg(feature = "wgpu")]
pub use adapters::open;
#[cfg(feature = "wgpu")]
use adapters::{automatic, on_wgpu};

#[cfg(feature = "wgpu")]
mod adapters {
    use std::sync::Arc;

    use moewe::host::{self, Adapter, Limits};
    use moewe::{Error, Result, Wgpu};

    use super::{Choice, Constraints, PassedOver, on_cpu};
    use crate::engine::{Device, Engine, Faults};
    use crate::pipelines::{self, Pipelines};

    /// The best hardware adapter that opens, else the CPU.
    pub fn automatic(constraints: Constraints) -> Choice {
        let wanted = |adapter: &Adapter| match adapter.software {
            true => Err("computes on the CPU; --backend wgpu would take it".into()),
            false => Ok(()),
        };
        let Opened { chosen, passed_over, failure: _, warnings, pipelines } =
            first(&host::adapters(), &wanted, constraints);
        match chosen {
            Some((adapter, engine)) => Choice { warnings, pipelines, ..on(adapter, engine, passed_over) },
            None => on_cpu(passed_over, constraints),
        }
    }

    /// The best adapter that opens, among those that `--adapter` allows.
    pub fn on_wgpu(part: Option<&str>, constraints: Constraints) -> Choice {
        let wanted = |adapter: &Adapter| match part {
            Some(part) if !adapter.matches(part) => Err(format!("does not match --adapter {part}")),
            Some(_) | None => Ok(()),
        };
        let Opened { chosen, passed_over, failure, warnings, pipelines } =
            first(&host::adapters(), &wanted, constraints);
        if let Some((adapter, engine)) = chosen {
            return Choice { warnings, pipelines, ..on(adapter, engine, passed_over) };
        }
        let names: Vec<&str> = passed_over.iter().map(|passed| passed.adapter.as_str()).collect();
        let absent = match (failure, part, names.as_slice()) {
            (Some(failure), _, _) => Choice::of("wgpu", Err(failure)),
            (None, _, []) => Choice::absent("wgpu", "backend", "wgpu", "this machine has no adapter".into()),
            (None, part, [..]) => {
                let because = format!("no adapter has this in its name or driver; there are: {}", names.join("; "));
                Choice::absent("wgpu", "adapter", part.unwrap_or(""), because)
            }
        };
        Choice { passed_over, ..absent }
    }

    fn on(adapter: String, engine: Box<dyn Engine>, passed_over: Vec<PassedOver>) -> Choice {
        Choice { adapter: Some(adapter), passed_over, ..Choice::of("wgpu", Ok(engine)) }
    }

    struct Opened {
        chosen: Option<(String, Box<dyn Engine>)>,
        passed_over: Vec<PassedOver>,
        /// Of the first adapter that was wanted and did not open.
        failure: Option<Error>,
        warnings: Vec<String>,
        pipelines: Option<Pipelines>,
    }

    impl Opened {
        /// Without a file, kernels are compiled: that is slower, and no error.
        fn keep(&mut self, device: &mut Device<Wgpu>) {
            match pipelines::keep(&device.backend) {
                Ok(None) => {}
                Ok(Some((backend, kept, told))) => {
                    device.backend = backend;
                    self.pipelines = Some(kept);
                    self.warnings.extend(told);
                }
                Err(error) => self.warnings.push(format!("compiled pipelines are not kept: {error}")),
            }
        }
    }

    fn first(
        adapters: &[Adapter],
        wanted: &dyn Fn(&Adapter) -> Result<(), String>,
        constraints: Constraints,
    ) -> Opened {
        let mut opened = Opened { chosen: None, passed_over: vec![], failure: None, warnings: vec![], pipelines: None };
        for adapter in adapters {
            let reason = match (&opened.chosen, wanted(adapter)) {
                (_, Err(reason)) => reason,
                (Some((better, _)), Ok(())) => format!("{better} comes first"),
                (None, Ok(())) => match open(adapter, constraints) {
                    Ok(mut device) => {
                        if constraints.keep_pipelines {
                            opened.keep(&mut device);
                        }
                        if device.backend.has_runtime_checks() {
                            let warning = "every kernel has wgpu's run-time checks: times are longer than without";
                            opened.warnings.push(warning.into());
                        }
                        opened.chosen = Some((adapter.name.clone(), Box::new(device)));
                        continue;
                    }
                    Err(error) => {
                        let reason = error.to_string();
                        opened.failure.get_or_insert(error);
                        reason
                    }
                },
            };
            opened.passed_over.push(PassedOver { adapter: adapter.name.clone(), reason });
        }
        opened
    }

    /// The device is our own, so its stray errors are ours to collect: wgpu's default is to panic.
    pub fn open(adapter: &Adapter, constraints: Constraints) -> Result<Device<Wgpu>> {
        let Constraints { portable, segment_bytes, checked, keep_pipelines: _ } = constraints;
        let backend = host::open(adapter, if portable { Limits::Default } else { Limits::Adapter })?;
        let backend = if checked { backend.with_runtime_checks() } else { backend };
        let faults = Faults::default();
        let sink = faults.clone();
        backend.device().on_uncaptured_error(Arc::new(move |error: moewe::wgpu::Error| sink.push(error.to_string())));
        Ok(Device { backend, faults, segment_bytes })
    }
}
