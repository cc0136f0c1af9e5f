"""What slurm/opd.sh and slurm/teacher.sh run: who does what on the nodes of a job."""
