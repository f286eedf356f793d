//! `moewe doctor`: what this machine has to run layers on, whether every kernel is right there, and how fast it is.

#[cfg(feature = "wgpu")]
mod adapter;
#[cfg(feature = "cuda")]
mod cuda;
mod page;

use std::time::Instant;

use moewe::conformance::answers::{self, Answers, Catalogue};
use moewe::conformance::synthetic;
use moewe::host::Host;
use moewe::{Cpu, Result};
use serde_json::Value;

use crate::bench::{Bench as _, OnDevice};
use crate::engine::{Device, Faults};
use crate::json::Status;
use crate::progress::Bar;
use crate::report::{complain, to_stdout};
use crate::{DoctorOptions, Exit};

/// Examines everything that there is.
pub fn doctor(options: &DoctorOptions) -> Exit {
    let mut examination = Examination { options, names: vec![], statuses: vec![] };
    #[cfg(feature = "wgpu")]
    adapter::examine(&mut examination);
    #[cfg(not(feature = "wgpu"))]
    examination.absent("wgpu", "not in this build");
    let cpu = Subject {
        backend: "cpu",
        adapter: None,
        name: "cpu".into(),
        api: None,
        driver: None,
        kind: "each kernel's twin in Rust",
        software: true,
        features: vec![],
        limits: vec![],
    };
    if examination.wants(&cpu) {
        let device = Device { backend: Cpu::new(), faults: Faults::default(), segment_bytes: None };
        let catalogue = Catalogue::new(&moewe::Backend::facts(&device.backend));
        examination.heading(&cpu);
        let health = health(&device, &catalogue);
        examination.ended(&cpu, Found::Examined(Box::new(health)));
    }
    #[cfg(feature = "cuda")]
    cuda::examine(&mut examination);
    #[cfg(not(feature = "cuda"))]
    examination.absent("cuda", "not in this build");
    examination.exit()
}

/// Something that layers run on.
struct Subject<'a> {
    backend: &'static str,
    /// As the other commands name it; `None` for a backend without adapters.
    adapter: Option<String>,
    name: String,
    api: Option<String>,
    driver: Option<String>,
    kind: &'a str,
    software: bool,
    features: Vec<Fact>,
    limits: Vec<Fact>,
}

/// A feature or a limit.
struct Fact {
    name: &'static str,
    value: Value,
    /// The value in words.
    shown: String,
    /// What it means for moewe.
    meaning: String,
}

/// What became of a subject.
enum Found {
    /// It ran.
    Examined(Box<Health>),
    /// It cannot run any layer, and why.
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code, reason = "only adapters may lack something"))]
    CannotRun(String),
    /// This build has no such backend, or this machine nothing for it: which.
    Absent(String),
}

struct Health {
    answers: Answers,
    /// Bytes a second.
    read_rate: Result<f64>,
    /// Operations a second of GEMMs.
    flop_rate: Result<f64>,
    /// Seconds, and how it was measured.
    dispatch: Result<(f64, &'static str)>,
    seconds: f64,
}

impl Found {
    /// `None` where nothing was asked of anyone.
    fn status(&self) -> Option<Status> {
        match self {
            Self::Examined(health) if health.answers.right() => Some(Status::Pass),
            Self::Examined(_) => Some(Status::Fail),
            Self::CannotRun(_) => Some(Status::Unsupported),
            Self::Absent(_) => None,
        }
    }
}

struct Examination<'a> {
    options: &'a DoctorOptions,
    /// Of all subjects.
    names: Vec<String>,
    /// Of those that were wanted.
    statuses: Vec<Status>,
}

impl Examination<'_> {
    /// Whether `--adapter` takes it.
    fn wants(&mut self, subject: &Subject<'_>) -> bool {
        let name = subject.adapter.as_deref().unwrap_or(subject.backend);
        self.names.push(name.to_owned());
        let part = self.options.adapter.as_ref().map(|part| part.to_lowercase());
        part.is_none_or(|part| name.to_lowercase().contains(&part))
    }

    fn heading(&self, subject: &Subject<'_>) {
        if !self.options.json {
            to_stdout(&page::heading(subject));
        }
    }

    fn ended(&mut self, subject: &Subject<'_>, found: Found) {
        to_stdout(&match self.options.json {
            true => format!("{}\n", page::json(subject, &found)),
            false => page::findings(subject, &found),
        });
        // One wrong kernel spoils most layers: the first say enough, the JSON has all.
        const TOLD: usize = 8;
        let complaints = page::complaints(&found);
        for complaint in complaints.iter().take(TOLD) {
            complain(&format!("{}: {complaint}", subject.name));
        }
        if complaints.len() > TOLD {
            complain(&format!("{}: and {} more, which --json lists", subject.name, complaints.len() - TOLD));
        }
        self.statuses.extend(found.status());
    }

    /// Says that a backend is not there, unless one adapter was asked for.
    fn absent(&mut self, backend: &'static str, why: &str) {
        if self.options.adapter.is_none() {
            let subject = Subject {
                backend,
                adapter: None,
                name: backend.into(),
                api: None,
                driver: None,
                kind: why,
                software: false,
                features: vec![],
                limits: vec![],
            };
            self.heading(&subject);
            self.ended(&subject, Found::Absent(why.into()));
        }
    }

    fn exit(&self) -> Exit {
        let any = |status| self.statuses.contains(&status);
        match (&self.options.adapter, self.statuses.as_slice()) {
            (Some(part), []) => {
                let there = self.names.join("; ");
                complain(&format!("--adapter {part}: nothing has this in its name or driver; there are: {there}"));
                Exit::Usage
            }
            _ if any(Status::Fail) => Exit::Failed,
            _ if any(Status::Unsupported) => Exit::Unsupported,
            _ => Exit::Passed,
        }
    }
}

/// Asks the known answers, then measures: a device that is wrong may be measured all the same.
fn health<B: Host + Clone + Sync>(device: &Device<B>, catalogue: &Catalogue) -> Health {
    let start = Instant::now();
    let (host, faults) = (&device.backend, &device.faults);
    let bar = Bar::new();
    let mut answers = answers::ask(host, catalogue, &|done, all| bar.at("known answers", done as u64, all as u64));
    let name = host.facts().backend;
    answers.complaints.extend(faults.check(name).err().map(|fault| fault.to_string()));
    bar.at("reading memory", 0, 1);
    let read_rate = OnDevice { backend: host, faults }.read_rate();
    bar.at("arithmetic", 0, 1);
    let flop_rate = synthetic::flop_rate(host).and_then(|rate| faults.check(name).map(|()| rate));
    bar.at("dispatches", 0, 1);
    let dispatch = synthetic::dispatch_cost(host).and_then(|cost| faults.check(name).map(|()| cost));
    Health { answers, read_rate, flop_rate, dispatch, seconds: start.elapsed().as_secs_f64() }
}
