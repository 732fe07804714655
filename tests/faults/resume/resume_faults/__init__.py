"""What the tests of killed and resumed trainings share: the trainings, the process that forks one for each
trial, and the test's side of it."""
