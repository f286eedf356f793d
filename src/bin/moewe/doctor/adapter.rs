//! The adapters that wgpu sees, and which of their features and limits matter here.

use moewe::backend::wgpu::required_limits;
use moewe::conformance::answers::Catalogue;
use moewe::host::{self, Adapter};
use moewe::wgpu::{self, Features};
use moewe::{Backend as _, Result, Wgpu};
use serde_json::json;

use super::{Examination, Fact, Found, Subject, health};
use crate::backends::{self, Constraints};
use crate::engine::Device;

/// Each adapter, best first.
pub fn examine(examination: &mut Examination<'_>) {
    for adapter in host::adapters() {
        let info = adapter.handle().get_info();
        let mut subject = Subject {
            backend: "wgpu",
            adapter: Some(adapter.name.clone()),
            name: info.name.clone(),
            api: Some(info.backend.to_string()),
            driver: Some(format!("{} {}", info.driver, info.driver_info)),
            kind: match info.device_type {
                wgpu::DeviceType::DiscreteGpu => "a GPU with memory of its own",
                wgpu::DeviceType::IntegratedGpu => "a GPU that shares the CPU's memory",
                wgpu::DeviceType::VirtualGpu => "a GPU of a virtual machine",
                wgpu::DeviceType::Cpu => "software, computes on the CPU",
                wgpu::DeviceType::Other => "unknown",
            },
            software: adapter.software,
            features: vec![],
            limits: limits(&adapter.handle().limits()),
        };
        if !examination.wants(&subject) {
            continue;
        }
        let opened = open(&adapter, examination.options.portable);
        let catalogue = opened.as_ref().ok().map(|device| Catalogue::new(&device.backend.facts()));
        subject.features = features(adapter.handle(), catalogue.as_ref());
        examination.heading(&subject);
        let found = match (opened, catalogue) {
            (Ok(device), Some(catalogue)) => Found::Examined(Box::new(health(&device, &catalogue))),
            (Err(reason), _) => Found::CannotRun(reason),
            (Ok(_), None) => Found::CannotRun("no layer was found for it".into()),
        };
        examination.ended(&subject, found);
    }
}

fn open(adapter: &Adapter, portable: bool) -> Result<Device<Wgpu>, String> {
    match shortcomings(&adapter.handle().limits()).as_slice() {
        [] => backends::open(adapter, Constraints { portable, ..Constraints::NONE }).map_err(|error| error.to_string()),
        short => Err(short.join("; ")),
    }
}

/// What an adapter has too little of.
fn shortcomings(limits: &wgpu::Limits) -> Vec<String> {
    let mut short = vec![];
    required_limits().check_limits_with_fail_fn(limits, false, |name, needed, found| {
        short.push(format!("{name} is {found}, {needed} is needed"));
    });
    short
}

fn features(adapter: &wgpu::Adapter, catalogue: Option<&Catalogue>) -> Vec<Fact> {
    let (has, info) = (adapter.features(), adapter.get_info());
    let used = |what: &str, word: &str| {
        let by: Vec<_> = catalogue.into_iter().flat_map(|catalogue| catalogue.kernels_with(word)).collect();
        match by.as_slice() {
            [] => format!("{what}; no kernel of a layer needs it"),
            _ => format!("{what}; used by {}", by.join(", ")),
        }
    };
    let fact = |name, has: bool, meaning| Fact {
        name,
        value: has.into(),
        shown: if has { "yes" } else { "no" }.into(),
        meaning,
    };
    let subgroups = has.contains(Features::SUBGROUP);
    let sizes = [info.subgroup_min_size, info.subgroup_max_size];
    let shapes = match has.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        true => adapter.cooperative_matrix_properties(),
        false => vec![],
    };
    let shape = |shape: &wgpu::CooperativeMatrixProperties| {
        let wgpu::CooperativeMatrixProperties { m_size, n_size, k_size, ab_type, cr_type, saturating_accumulation: _ } =
            shape;
        format!("{m_size}x{n_size}x{k_size} {ab_type:?} to {cr_type:?}")
    };
    let shapes: Vec<String> = shapes.iter().map(shape).collect();
    let timestamps = has.contains(Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);
    vec![
        fact("f16", has.contains(Features::SHADER_F16), used("arithmetic of 16 bits", "f16")),
        Fact {
            name: "subgroups",
            value: if subgroups { json!(sizes) } else { json!(null) },
            shown: match sizes {
                _ if !subgroups => "no".into(),
                [min, max] if min == max => format!("of {min}"),
                [min, max] => format!("{min} to {max}"),
            },
            meaning: used("invocations that exchange values without memory", "subgroup"),
        },
        fact(
            "subgroup barrier",
            has.contains(Features::SUBGROUP_BARRIER),
            used("a subgroup that waits for itself alone", "subgroupBarrier"),
        ),
        Fact {
            name: "cooperative matrix",
            value: json!(shapes),
            shown: if shapes.is_empty() { "no".into() } else { format!("{} shapes", shapes.len()) },
            meaning: used(
                &match shapes.is_empty() {
                    true => "matrix units".into(),
                    false => format!("matrix units, {}", shapes.join(", ")),
                },
                "coop_mat",
            ),
        },
        fact(
            "timestamps",
            timestamps,
            match timestamps {
                true => "times are the GPU's own".into(),
                false => "times are the host's, submission and wait included".into(),
            },
        ),
        fact(
            "pipeline cache",
            has.contains(Features::PIPELINE_CACHE),
            "compiled kernels on disk, for the next run".into(),
        ),
        fact(
            "immediates",
            has.contains(Features::IMMEDIATES),
            "small values in the commands; not needed, counts of tokens come from a buffer".into(),
        ),
    ]
}

fn limits(found: &wgpu::Limits) -> Vec<Fact> {
    let needed = required_limits();
    let bytes = |bytes: u64| match bytes {
        bytes if bytes >= 1 << 30 => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        bytes if bytes >= 1 << 20 => format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)),
        bytes => format!("{:.0} KiB", bytes as f64 / 1024.0),
    };
    let plain = |count: u64| count.to_string();
    let fact = |name, found: u64, needed: u64, show: &dyn Fn(u64) -> String, meaning: &str| Fact {
        name,
        value: found.into(),
        shown: show(found),
        meaning: format!("{meaning}; {} needed", show(needed)),
    };
    vec![
        fact(
            "storage binding",
            found.max_storage_buffer_binding_size,
            needed.max_storage_buffer_binding_size,
            &bytes,
            "weights of a layer are cut into pieces no larger",
        ),
        fact("buffer", found.max_buffer_size, needed.max_buffer_size, &bytes, "and no piece exceeds a buffer"),
        fact(
            "storage buffers",
            found.max_storage_buffers_per_shader_stage.into(),
            needed.max_storage_buffers_per_shader_stage.into(),
            &plain,
            "that one kernel reads and writes",
        ),
        fact(
            "workgroup memory",
            found.max_compute_workgroup_storage_size.into(),
            needed.max_compute_workgroup_storage_size.into(),
            &bytes,
            "holds tiles, and the router's scores of a token",
        ),
        fact(
            "invocations",
            found.max_compute_invocations_per_workgroup.into(),
            needed.max_compute_invocations_per_workgroup.into(),
            &plain,
            "of a workgroup",
        ),
        fact(
            "workgroups",
            found.max_compute_workgroups_per_dimension.into(),
            needed.max_compute_workgroups_per_dimension.into(),
            &plain,
            "in a dimension; calls of more rows pass in parts",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_below_the_floor_is_told_what_it_lacks() {
        assert!(shortcomings(&required_limits()).is_empty());
        let short = shortcomings(&wgpu::Limits::downlevel_webgl2_defaults());
        assert!(short.contains(&"max_storage_buffers_per_shader_stage is 0, 8 is needed".to_owned()), "{short:?}");
        let short = shortcomings(&wgpu::Limits { max_compute_workgroup_storage_size: 8192, ..required_limits() });
        assert_eq!(short, ["max_compute_workgroup_storage_size is 8192, 16384 is needed"]);
    }
}
