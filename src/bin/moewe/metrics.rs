//! Distances between what was found and what was expected. NaN where none is expected is never small.

/// Largest of errors; NaN is larger than any.
pub fn largest(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |worst, error| match worst.is_nan() || error.is_nan() {
        true => f64::NAN,
        false => worst.max(error),
    })
}

/// |found - expected|. Equal values, NaN and infinities included, differ by 0.
pub fn difference(found: f32, expected: f32) -> f64 {
    match found == expected || (found.is_nan() && expected.is_nan()) {
        true => 0.0,
        false => (f64::from(found) - f64::from(expected)).abs(),
    }
}

/// Largest |found - expected|.
pub fn absolute(found: &[f32], expected: &[f32]) -> f64 {
    largest(pairs(found, expected).map(|(found, expected)| difference(found, expected)))
}

/// Largest |found - expected| / |expected|.
pub fn relative(found: &[f32], expected: &[f32]) -> f64 {
    largest(pairs(found, expected).map(|(found, expected)| {
        let difference = difference(found, expected);
        if difference == 0.0 { 0.0 } else { quotient(difference, f64::from(expected).abs()) }
    }))
}

/// Largest |found - expected| / max(1, |expected|).
pub fn relative_above_one(found: &[f32], expected: &[f32]) -> f64 {
    largest(
        pairs(found, expected)
            .map(|(found, expected)| quotient(difference(found, expected), f64::from(expected).abs().max(1.0))),
    )
}

/// `1 - 2 sum(xy) / sum(x^2 + y^2)`, in f64; 0 if both are 0.
pub fn calc_diff(found: &[f32], expected: &[f32]) -> f64 {
    // 1 - 2xy / (x^2 + y^2) = (x - y)^2 / (x^2 + y^2), which does not cancel.
    let (mut distance, mut norm) = (0.0, 0.0);
    for (found, expected) in pairs(found, expected) {
        let difference = difference(found, expected);
        distance += difference * difference;
        // Equal infinities and NaN are no distance and would make any other vanish.
        if difference != 0.0 || expected.is_finite() {
            norm += f64::from(found).powi(2) + f64::from(expected).powi(2);
        }
    }
    if distance == 0.0 { 0.0 } else { quotient(distance, norm) }
}

/// Largest `||found - expected|| / ||expected||` of the rows.
pub fn row_relative(found: &[f32], expected: &[f32], width: usize) -> f64 {
    let rows = found.chunks(width.max(1)).zip(expected.chunks(width.max(1)));
    largest(rows.map(|(found, expected)| {
        let distance: f64 = pairs(found, expected).map(|(f, e)| difference(f, e).powi(2)).sum();
        let norm: f64 = expected.iter().filter(|e| e.is_finite()).map(|e| f64::from(*e).powi(2)).sum();
        if distance == 0.0 { 0.0 } else { quotient(distance, norm).sqrt() }
    }))
}

/// An infinite distance stays infinite, whatever it is divided by.
fn quotient(distance: f64, norm: f64) -> f64 {
    if distance == f64::INFINITY { distance } else { distance / norm }
}

/// Positions that differ.
pub fn differing(found: &[i32], expected: &[i32]) -> usize {
    found.iter().zip(expected).filter(|(found, expected)| found != expected).count()
        + found.len().abs_diff(expected.len())
}

/// Ids ascending in each row of `top_k`, stable, and the weights permuted alike.
pub fn sort_slots(ids: &[i32], weights: &[f32], top_k: usize) -> (Vec<i32>, Vec<f32>) {
    let rows = ids.chunks(top_k.max(1)).zip(weights.chunks(top_k.max(1)));
    rows.flat_map(|(ids, weights)| {
        let mut slots: Vec<(i32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
        slots.sort_by_key(|(id, _)| *id);
        slots
    })
    .unzip()
}

fn pairs<'a>(found: &'a [f32], expected: &'a [f32]) -> impl Iterator<Item = (f32, f32)> + 'a {
    found.iter().copied().zip(expected.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_where_none_is_expected_is_no_small_error() {
        for metric in [absolute, relative, relative_above_one, calc_diff] {
            assert!(metric(&[f32::NAN, 1.0], &[1.0, 1.0]).is_nan());
            assert!(metric(&[1.0, 1.0], &[f32::NAN, 1.0]).is_nan());
            assert_eq!(metric(&[f32::NAN, 1.0], &[f32::NAN, 1.0]), 0.0);
        }
        assert!(row_relative(&[f32::NAN, 1.0], &[1.0, 1.0], 2).is_nan());
    }

    #[test]
    fn infinities_are_equal_to_themselves_only() {
        for metric in [absolute, relative, relative_above_one, calc_diff] {
            assert_eq!(metric(&[f32::INFINITY], &[f32::INFINITY]), 0.0);
            assert_eq!(metric(&[f32::INFINITY, 1.0], &[1.0, 1.0]), f64::INFINITY);
            assert_eq!(metric(&[f32::INFINITY], &[f32::NEG_INFINITY]), f64::INFINITY);
        }
    }

    #[test]
    fn calc_diff_is_one_minus_twice_the_product_over_the_squares() {
        let (x, y) = ([1.0, 2.0, -3.0], [1.5, 2.0, -2.0]);
        let expected = 1.0 - 2.0 * (1.5 + 4.0 + 6.0) / (14.0 + 10.25);
        assert!((calc_diff(&x, &y) - expected).abs() < 1e-15);
        assert_eq!(calc_diff(&[0.0], &[0.0]), 0.0);
        assert_eq!(calc_diff(&[0.0], &[1.0]), 1.0);
    }

    #[test]
    fn slots_are_sorted_with_their_weights() {
        let (ids, weights) = sort_slots(&[3, 1, 2, 2], &[0.3, 0.1, 0.2, 0.25], 2);
        assert_eq!(ids, [1, 3, 2, 2]);
        assert_eq!(weights, [0.1, 0.3, 0.2, 0.25]);
    }
}
