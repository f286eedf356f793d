// The rows of a tile wait in workgroup memory, in stretches. [row][quad of a vector][vector]: neighbouring
// invocations read neighbours.
const STAGE_VECS: u32 = STAGE_QUADS / QUADS;

var<workgroup> stage: array<vec4<f32>, ROWS * STAGE_QUADS>;
