// x comes from memory, a vector or two of it for a vector of weights: the caches hold it.
const STAGED: bool = false;
const STAGE_VECS: u32 = VECS_PER_ROW;

struct Entering {
    low: vec4<u32>,
    high: vec4<u32>,
}

fn stage_input(row: u32, index: u32, begin: u32, count: u32) {
}

// What meets vector `begin + vec`.
fn entering_at(row: u32, begin: u32, vec: u32) -> Entering {
    let at = row / INPUT_DIVISOR * INPUT_ROW_VECS + (begin + vec) * INPUT_VECS;
    let low = rows[at];
    if INPUT_VECS == 2u {
        return Entering(low, rows[at + 1u]);
    }
    return Entering(low, low);
}

fn entering_quad(entering: Entering, quad: u32) -> vec4<f32> {
    if quad < QUADS / INPUT_VECS {
        return direct_quad(entering.low, quad);
    }
    return direct_quad(entering.high, quad - QUADS / INPUT_VECS);
}

fn entering_nans(entering: Entering) -> u32 {
    if INPUT_VECS == 2u {
        return direct_nans(entering.low) | direct_nans(entering.high);
    }
    return direct_nans(entering.low);
}
