//! Packed weights hold what the checkpoint holds, in every format and however a checkpoint arranges it.

use fastrand::Rng;
use moewe::kernels::pack::{GroupSource, PackedMatrix};
use moewe::spec::WeightFormat;

use crate::random::FORMATS;
use crate::rig::{OwnedMatrix, fits};

#[test]
fn packing_changes_no_value() {
    let rng = &mut Rng::with_seed(5);
    // Several rounds, for INT4 and NVFP4 are arranged by chance.
    for round in 0..4 {
        for format in FORMATS {
            for (rows, cols) in [(1, 256), (70, 35), (33, 100), (64, 512), (24, 50)] {
                if fits(format, cols) {
                    let pair = 1 + round % 2;
                    round_trip(rng, format, [rows, cols], pair);
                }
            }
        }
    }
}

fn round_trip(rng: &mut Rng, format: WeightFormat, [rows, cols]: [usize; 2], pair: usize) {
    let owned: Vec<OwnedMatrix> = (0..pair).map(|_| OwnedMatrix::random(rng, format, [rows, cols])).collect();
    let views: Vec<_> = owned.iter().map(OwnedMatrix::view).collect();
    let biases: Vec<Vec<f32>> = (0..pair).map(|_| (0..rows).map(|_| rng.f32()).collect()).collect();
    let matrix = PackedMatrix {
        name: "test",
        groups: 1,
        rows: pair * rows,
        cols,
        parts: format.parts(),
        pair,
        bias: true,
        segments: vec![],
    };
    let placed = matrix.place("test", 9000).unwrap();
    let mut seen = 0;
    for (at, segment) in placed.segments.iter().enumerate() {
        // What packing leaves out would show as NaN.
        let mut memory = vec![u32::MAX; segment.words];
        let source = |_| {
            Ok(GroupSource { matrices: views.iter().collect(), biases: biases.iter().map(Vec::as_slice).collect() })
        };
        let write = &mut |first: usize, words: &[u32]| {
            memory[first..first + words.len()].copy_from_slice(words);
            Ok(())
        };
        placed.pack(at, &source, write).unwrap();
        for span in &segment.spans {
            for row in span.row_begin..span.row_end {
                let (part, feature) = (row % pair, row / pair);
                for col in 0..cols {
                    let (packed, stored) = (placed.value(&memory, span, row, col), views[part].get(feature, col));
                    let same = packed.to_bits() == stored.to_bits() || (packed.is_nan() && stored.is_nan());
                    assert!(same, "{format:?} [{rows}, {cols}] at ({row}, {col}): {packed} for {stored}");
                }
                assert_eq!(f32::from_bits(memory[span.bias + row - span.row_begin]), biases[part][feature]);
                seen += 1;
            }
        }
    }
    assert_eq!(seen, pair * rows);
}
