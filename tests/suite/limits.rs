//! Devices that are small and layers that are large: what `lower` cuts, and that no index leaves its type.

use moewe::schedule::{DeviceFacts, Schedule, Units, lower};
use moewe::spec::*;
use moewe::{Cut, Cuts, Options, Scope};

use crate::layers::check;
use crate::rig::{AUTO, GEMV, RandomLayer, TILED, deepseek_like, gpu, with_units};

/// DeepSeek-V3's routed layer in bf16: 256 experts of 3 * 2048 * 7168 weights.
fn deepseek_v3() -> MoeSpec {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (7168, 256, 8);
    spec.experts.intermediate_size = 2048;
    spec.shared.as_mut().unwrap().mlp.intermediate_size = 2048;
    spec.routing.method = RoutingMethod::TopK {
        score: Score::Sigmoid,
        key: SelectionKey::ScorePlusBias,
        groups: Some(Groups { n_group: 8, topk_group: 4, score: GroupScore::Top2SumOfKey }),
    };
    spec
}

/// Every buffer fits a binding, every step the grid, every index 32 bits; all weights have a place.
fn holds(schedule: &Schedule, facts: &DeviceFacts, segment_bytes: u64) {
    for buffer in &schedule.buffers {
        // What holds rows of all tokens is bound a chunk at a time.
        let bound = buffer.token_bytes.map_or(buffer.bytes, |bytes| bytes * schedule.chunk_tokens as u64);
        assert!(bound <= facts.max_binding_bytes, "{}: {bound} bytes", buffer.name);
        // Values of 2 bytes are counted in u32 by the kernels.
        assert!(bound / 2 < 1 << 32, "{}: an index beyond 32 bits", buffer.name);
    }
    for matrix in &schedule.matrices {
        let rows: usize = matrix.segments.iter().flat_map(|s| &s.spans).map(|s| s.row_end - s.row_begin).sum();
        assert_eq!(rows, matrix.groups * matrix.rows, "{}", matrix.name);
        assert!(matrix.segments.iter().all(|segment| 4 * segment.words as u64 <= segment_bytes), "{}", matrix.name);
    }
    for bucket in &schedule.buckets {
        for step in &bucket.steps {
            let grid = step.grid.workgroups(bucket.max_tokens);
            assert!(grid.iter().all(|&count| count <= facts.max_workgroups), "{}: {grid:?}", step.name);
        }
    }
}

#[test]
fn weights_of_a_real_layer_are_cut_into_segments_of_any_size() {
    // 64 KiB, WebGPU's default of 128 MiB, and the 2 GiB of large adapters.
    let counts = [64 << 10, 128 << 20, (2 << 30) - 4].map(|bytes: u64| {
        let facts = DeviceFacts {
            backend: "test",
            max_binding_bytes: bytes.max(128 << 20),
            max_workgroups: 65_535,
            exact_halves: false,
            matrix_units: Units::None,
        };
        let options = Options { segment_bytes: Some(bytes), ..AUTO };
        // A row of 7168 bf16 values has 14 KiB: four fit a segment of 64 KiB. One expert of such cuts is enough.
        let mut spec = deepseek_v3();
        if bytes == 64 << 10 {
            (spec.num_experts, spec.top_k) = (8, 2);
            spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::Score, groups: None };
        }
        let schedule = lower(&spec, Scope::Layer, 4096, &facts, &options).unwrap();
        holds(&schedule, &facts, bytes);
        schedule.matrices.iter().find(|matrix| matrix.name == "experts.gate_up").unwrap().segments.len()
    });
    // 8 * 4096 rows of 14 KiB, four a segment; 256 * 4096 of them are 14 GiB, less what a cut at a tile leaves free.
    assert_eq!(counts, [8192, 113, 8]);
}

#[test]
fn rows_times_widths_beyond_31_bits_are_cut_into_chunks() {
    // 65,536 tokens * 8 slots * 2 * 2048 features are 2^31; their bytes are 2^33.
    let facts = DeviceFacts {
        backend: "test",
        max_binding_bytes: (2 << 30) - 4,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    };
    let tokens = 1 << 16;
    let schedule = lower(&deepseek_v3(), Scope::Layer, tokens, &facts, &TILED).unwrap();
    assert!(tokens * 8 * 2 * 2048 >= 1 << 31 && schedule.chunk_tokens < tokens);
    assert!(schedule.chunk_tokens.is_multiple_of(128));
    holds(&schedule, &facts, facts.max_binding_bytes);
    // A small device cuts finer.
    let facts = DeviceFacts { max_binding_bytes: 128 << 20, ..facts };
    let finer = lower(&deepseek_v3(), Scope::Layer, tokens, &facts, &TILED).unwrap();
    assert!(finer.chunk_tokens < schedule.chunk_tokens / 8);
    holds(&finer, &facts, facts.max_binding_bytes);
}

#[test]
fn what_no_cut_can_make_fit_is_refused_by_name() {
    let facts = DeviceFacts {
        backend: "test",
        max_binding_bytes: 1 << 20,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    };
    let refusal = lower(&deepseek_v3(), Scope::Layer, 4096, &facts, &AUTO).unwrap_err().to_string();
    assert!(refusal.contains("test does not support") && refusal.contains("binding"), "{refusal}");
}

#[test]
fn more_rows_than_a_grid_has_workgroups() {
    // 65,535 workgroups in a dimension: 8,300 tokens of 8 slots have 66,400 rows.
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (8, 9, 8);
    spec.experts.intermediate_size = 2;
    spec.shared = None;
    spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
    for options in [GEMV, TILED] {
        check(&RandomLayer::new(spec.clone(), 51), 8300, &options, &format!("66,400 rows, {options:?}"));
    }
}

#[test]
fn more_tokens_than_a_grid_has_workgroups() {
    // The routing has a workgroup a token: 70,000 tokens pass in two chunks.
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (4, 3, 1);
    spec.experts.intermediate_size = 1;
    spec.shared = None;
    spec.routing.method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    let layer = RandomLayer::new(spec, 52);
    let plan = moewe::Plan::new(gpu().clone(), &layer.spec, &layer.weights(), 70_000, &AUTO).unwrap();
    assert!(plan.schedule().chunk_tokens < 70_000);
    check(&layer, 70_000, &AUTO, "70,000 tokens");
}

#[test]
fn numbers_of_experts_that_are_no_power_of_two() {
    for num_experts in [1, 3, 60, 160, 384, 513, 1024] {
        let mut spec = deepseek_like();
        (spec.hidden_size, spec.num_experts, spec.top_k) = (12, num_experts, num_experts.min(6));
        spec.experts.intermediate_size = 3;
        spec.routing.method =
            RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
        let layer = RandomLayer::new(spec, 53);
        for (tokens, options) in [(1, GEMV), (5, TILED), (129, TILED)] {
            check(&layer, tokens, &options, &format!("{num_experts} experts, {tokens} tokens"));
        }
    }
}

#[test]
fn tuned_bounds_cut_calls_where_they_say() {
    let facts = with_units(Units::None);
    let mut spec = deepseek_like();
    (spec.num_experts, spec.top_k) = (16, 4);
    spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
    let tokens = |cuts| {
        let schedule = lower(&spec, Scope::Layer, 1000, &facts, &Options { cuts, ..AUTO }).unwrap();
        schedule.buckets.iter().map(|bucket| bucket.max_tokens).collect::<Vec<_>>()
    };
    // Half a row, 2, 8 and 48 rows in the mean are what the library has found itself: 2, 8, 32 and 192 tokens.
    let own = [8, 32, 128, 768, u32::MAX];
    assert_eq!(tokens(Cuts::UpToMeanRows(own)), tokens(Cuts::ByMeanRows));
    assert_eq!(tokens(Cuts::UpToMeanRows(own)), [2, 8, 32, 192, 1000]);
    assert_eq!(tokens(Cuts::UpToMeanRows([0, 0, 40, 0, 0])), [10, 1000]);
    assert_eq!(tokens(Cuts::UpToMeanRows([u32::MAX; 5])), tokens(Cuts::only(Cut::Gemv)));
    assert_eq!(tokens(Cuts::UpToMeanRows([0; 5])), [1000]);
}
