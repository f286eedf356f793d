//! The CUDA devices.

use moewe::conformance::answers::Catalogue;
use moewe::{Backend as _, Cuda};
use serde_json::json;

use super::{Examination, Fact, Found, Subject, health};
use crate::engine::{Device, Faults};

/// Each device, by its number; or why there is none.
pub fn examine(examination: &mut Examination<'_>) {
    let count = match Cuda::count() {
        Ok(count) => count,
        Err(error) => return examination.absent("cuda", &error.to_string()),
    };
    for ordinal in 0..count {
        let opened = Cuda::open(ordinal);
        let name = opened.as_ref().map_or_else(|_| format!("device {ordinal}"), |device| device.name().to_owned());
        let mut subject = Subject {
            backend: "cuda",
            adapter: Some(format!("{name} (cuda device {ordinal})")),
            name,
            api: Some("cuda".into()),
            driver: None,
            kind: "a GPU with memory of its own",
            software: false,
            features: vec![],
            limits: vec![],
        };
        if !examination.wants(&subject) {
            continue;
        }
        subject.features = opened.as_ref().map(features).unwrap_or_default();
        examination.heading(&subject);
        let found = match opened {
            Ok(backend) => {
                let catalogue = Catalogue::new(&backend.facts());
                let device = Device { backend, faults: Faults::default(), segment_bytes: None };
                Found::Examined(Box::new(health(&device, &catalogue)))
            }
            Err(error) => Found::CannotRun(error.to_string()),
        };
        examination.ended(&subject, found);
    }
}

fn features(device: &Cuda) -> Vec<Fact> {
    let arch = device.compiler().arch();
    vec![Fact {
        name: "architecture",
        value: json!(arch),
        shown: arch.into(),
        meaning: "what NVRTC compiles for; matrix units of warps multiply bf16, FP8 and MXFP4".into(),
    }]
}
