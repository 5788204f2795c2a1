"""From a trained adapter and a case to masks on the case's own grid."""
